"""Faults of reading and preparing data: microdit_jax/data and microdit_jax/prepare."""

PIPELINE = "microdit_jax/data/pipeline.py"
FILES = "microdit_jax/data/shard_files.py"
MDS = "microdit_jax/data/mds.py"
RECORDS = "microdit_jax/data/records.py"
PREPARE = "microdit_jax/prepare/"

MUTANTS = [
    # ------------------------------------------------------------ found by no test at first
    {
        "name": "the cache forgets the first file fetched, not the longest unused",
        "file": FILES,
        "old": "            self._kept.move_to_end(name)\n",
        "new": "",
        "tests": ["tests/test_data_shard_files.py"],
    },
    {
        "name": "the cache forgets an earlier run's newest file first",
        "file": FILES,
        "old": "in sorted(found):",
        "new": "in sorted(found, reverse=True):",
        "tests": ["tests/test_data_shard_files.py"],
    },
    {
        "name": "a cached file of another size is used",
        "file": FILES,
        "old": "        if os.fstat(file.fileno()).st_size == size:\n",
        "new": "        if os.fstat(file.fileno()).st_size >= 0:\n",
        "tests": ["tests/test_data_shard_files.py"],
    },
    {
        "name": "only the first of several hashes is checked",
        "file": MDS,
        "old": "in file.hashes.items():",
        "new": "in list(file.hashes.items())[:1]:",
        "tests": ["tests/test_data_mds.py::test_damage_within_a_value_is_found_by_hashes_alone"],
    },
    {
        "name": "another order in memory: runs that resume see other batches",
        "file": PIPELINE,
        "old": 'np.argsort(noise, kind="stable")',
        "new": 'np.argsort(~noise, kind="stable")',
        "tests": ["tests/test_data_pipeline.py"],
    },
    {
        "name": "an image's noise is the same at all resolutions",
        "file": PREPARE + "encoding.py",
        "old": '{seed}/{shape}/{id}"',
        "new": '{seed}/{id}"',
        "tests": ["tests/test_prepare_encoding.py"],
    },
    {
        "name": "a last part without usable images hides the shapes of all",
        "file": PREPARE + "job.py",
        "old": 'shapes = report["shapes"] or shapes',
        "new": 'shapes = report["shapes"]',
        "tests": [
            "tests/test_prepare_job.py::"
            "test_a_part_without_a_usable_image_leaves_the_others_as_they_are"
        ],
    },
    {
        "name": "captions to be kept are cleaned",
        "file": PREPARE + "decoding.py",
        "old": "captions.clean(caption) if options.clean else caption",
        "new": "captions.clean(caption)",
        "tests": ["tests/test_prepare_job.py::test_captions_can_be_kept_as_they_are"],
    },
    {
        "name": "--keep_captions is ignored",
        "file": PREPARE + "__main__.py",
        "old": "clean=not args.keep_captions",
        "new": "clean=True",
        "tests": ["tests/test_prepare_job.py::test_flags_decide_the_options"],
    },
    {
        "name": "by default images smaller than the largest resolution are left out",
        "file": PREPARE + "__main__.py",
        "old": "min(resolutions) if args.min_size",
        "new": "max(resolutions) if args.min_size",
        "tests": ["tests/test_prepare_job.py::test_flags_decide_the_options"],
    },
    {
        "name": "the contact sheet decodes latents without their scaling factor",
        "file": PREPARE + "__main__.py",
        "old": "codec.decode(latents / np.float32(codec.scaling_factor))",
        "new": "codec.decode(latents)",
        "tests": [
            "tests/test_prepare_job.py::test_the_command_writes_a_report_and_a_contact_sheet"
        ],
    },
    {
        "name": "images of unsafe prompts are kept",
        "file": PREPARE + "sources/diffusiondb.py",
        "old": "not all(score <= SAFETY_THRESHOLD for score in scores)",
        "new": "not scores[0] <= SAFETY_THRESHOLD",
        "tests": ["tests/test_prepare_archives.py::test_diffusiondb"],
    },
    {
        "name": "files whose suffix is in capitals are passed over",
        "file": PREPARE + "sources/archives.py",
        "old": "name.partition('.')[2].lower()",
        "new": "name.partition('.')[2]",
        "tests": ["tests/test_prepare_archives.py::test_webdataset_shards"],
    },
    {
        "name": "arrays that TFDS encodes otherwise are read as raw bytes",
        "file": "microdit_jax/data/arrayrecord.py",
        "old": 'if feature.shape and feature.encoding != "bytes":',
        "new": "if False:",
        "tests": ["tests/test_prepare_arrayrecord_writer.py"],
    },
    # ------------------------------------------------------------ and their like
    {
        "name": "neighbouring batches drop the same captions, moved by one",
        "file": PIPELINE,
        "old": "counter=batch * len(numbers))",
        "new": "counter=batch)",
        "tests": ["tests/test_data_pipeline.py::test_each_record_has_a_chance_of_its_own"],
    },
    {
        "name": "captions are dropped for a batch as a whole",
        "file": PIPELINE,
        "old": "[:, 0]\n",
        "new": "[:1, 0].repeat(len(numbers))\n",
        "tests": ["tests/test_data_pipeline.py"],
    },
    {
        "name": "sources are mixed alike, whatever their weights",
        "file": PIPELINE,
        "old": "grain.MapDataset.mix(streams, weights)",
        "new": "grain.MapDataset.mix(streams)",
        "tests": ["tests/test_data_pipeline.py"],
    },
    {
        "name": "records of several sources stay grouped by source",
        "file": PIPELINE,
        "old": "for part in parts])[inverse] for",
        "new": "for part in parts]) for",
        "tests": ["tests/test_data_pipeline.py"],
    },
    {
        "name": "every epoch has the same order",
        "file": PIPELINE,
        "old": "counter=[0, epoch, 0, 0]",
        "new": "counter=[0, 0, 0, 0]",
        "tests": ["tests/test_data_pipeline.py"],
    },
    {
        "name": "the data seed is ignored",
        "file": PIPELINE,
        "old": "np.random.SeedSequence(seed)",
        "new": "np.random.SeedSequence(0)",
        "tests": ["tests/test_data_pipeline.py"],
    },
    {
        "name": "a shard longer than its offsets say is taken",
        "file": MDS,
        "old": "offsets[-1] != len(view)",
        "new": "offsets[-1] > len(view)",
        "tests": ["tests/test_data_mds.py"],
    },
    {
        "name": "an axis of 256 is stored in one byte",
        "file": "microdit_jax/data/mds_encodings.py",
        "old": "max(value.shape) < 1 << (8 << i)",
        "new": "max(value.shape) <= 1 << (8 << i)",
        "tests": ["tests/test_data_mds_encodings.py"],
    },
    {
        "name": "arrays of another byte order are stored in it",
        "file": "microdit_jax/data/mds_encodings.py",
        "old": "value.astype(_SCALARS[value.dtype.name], copy=False).tobytes()",
        "new": "value.tobytes()",
        "tests": ["tests/test_data_mds_encodings.py"],
    },
    {
        "name": "infinity passes for a latent",
        "file": RECORDS,
        "old": ".max() >= 0x7C00",
        "new": ".max() > 0x7C00",
        "tests": ["tests/test_data_records.py"],
    },
    {
        "name": "height and width of stored latents are exchanged",
        "file": RECORDS,
        "old": "latents.transpose(1, 2, 0)",
        "new": "latents.transpose(2, 1, 0)",
        "tests": ["tests/test_data_records.py"],
    },
    {
        "name": "latents of another text encoder are taken",
        "file": RECORDS,
        "old": "        if want != have:\n",
        "new": '        if want != have and kind == "VAE":\n',
        "tests": ["tests/test_data_records.py"],
    },
    {
        "name": "the crop rounds down",
        "file": PREPARE + "decoding.py",
        "old": "int(round((side - resolution) / 2))",
        "new": "(side - resolution) // 2",
        "tests": ["tests/test_prepare_decoding.py"],
    },
    {
        "name": "transparent pixels turn black",
        "file": PREPARE + "decoding.py",
        "old": 'Image.new("RGBA", image.size, "white")',
        "new": 'Image.new("RGBA", image.size, "black")',
        "tests": ["tests/test_prepare_decoding.py"],
    },
    {
        "name": "an image's longer side decides whether it is large enough",
        "file": PREPARE + "decoding.py",
        "old": "if min(image.size) < options.min_size",
        "new": "if max(image.size) < options.min_size",
        "tests": ["tests/test_prepare_job.py::test_what_cannot_be_used_is_counted_and_listed"],
    },
    {
        "name": "the last batch of a part is not filled up",
        "file": PREPARE + "encoding.py",
        "old": "full_batches(len(images), options.batch)",
        "new": "full_batches(len(images), len(images))",
        "tests": ["tests/test_prepare_encoding.py"],
    },
    {
        "name": "the codec is fitted on held-out images too",
        "file": PREPARE + "emoji_set.py",
        "old": "fit_codec(fitted[~heldout]",
        "new": "fit_codec(fitted",
        "tests": ["tests/test_prepare_emoji_set.py::test_the_codec_sees_training_images_only"],
    },
    {
        "name": "a process does the parts of all",
        "file": PREPARE + "reformat.py",
        "old": "range(process_index, len(parts), process_count)",
        "new": "range(len(parts))",
        "tests": ["tests/test_prepare_reformat.py::test_processes_share_the_work"],
    },
]
