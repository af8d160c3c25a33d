"""Faults between prompts and images: the sampler's wiring, noise, PNGs, the web page."""

PIPELINE = "microdit_jax/sampling/pipeline.py"
PROGRAMS = "microdit_jax/sampling/programs.py"
LOOP = "microdit_jax/sampling/loop.py"
SETTINGS = "microdit_jax/sampling/settings.py"
GUIDANCE = "microdit_jax/sampling/guidance.py"
IMAGES = "microdit_jax/images/files.py"
IMAGE_SETTINGS = "microdit_jax/images/settings.py"
STUDIO = "microdit_jax/app/studio.py"
EDITING = "microdit_jax/sampling/editing.py"
CHURN = "microdit_jax/sampling/churn.py"
STUDENT = "microdit_jax/sampling/student.py"
COMMAND = "sample_main.py"
AGAIN = "tests/test_sample_main.py::test_an_edited_and_autoguided_image_is_made_again_to_the_bit"
EDITING_TESTS = "tests/test_sampling_editing.py"
STUDENT_TESTS = "tests/test_sampling_student.py"
TESTS = "tests/test_sampling_pipeline.py"
LOOP_TESTS = "tests/test_sampling_loop.py"

MUTANTS = [
    {
        "name": "seed 0 counts as no seed, and so is random",
        "file": PIPELINE,
        "old": "secrets.randbits(32) if seed is None else seed",
        "new": "seed or secrets.randbits(32)",
        "tests": [f"{TESTS}::test_seed_0_is_a_seed_and_none_is_another_each_time"],
    },
    {
        "name": "no seed is always the same seed",
        "file": PIPELINE,
        "old": "secrets.randbits(32) if seed is None else seed",
        "new": "0 if seed is None else seed",
        "tests": [f"{TESTS}::test_seed_0_is_a_seed_and_none_is_another_each_time"],
    },
    {
        "name": "a guidance scale below 1 means none",
        "file": SETTINGS,
        "old": "        if scale == 1 and",
        "new": "        if scale <= 1 and",
        "tests": [f"{LOOP_TESTS}::test_guidance_scales"],
    },
    {
        "name": "guidance 1 pays for a doubled batch",
        "file": SETTINGS,
        "old": "        if scale == 1 and",
        "new": "        if scale is None and",
        "tests": [f"{LOOP_TESTS}::test_guidance_scales"],
    },
    {
        "name": "the negative prompt is not used",
        "file": LOOP,
        "old": "if unconditional is None else unconditional",
        "new": "if True else unconditional",
        "tests": [f"{LOOP_TESTS}::test_a_negative_prompt_takes_the_zero_captions_place"],
    },
    {
        "name": "outside of its interval guidance is masked, not left out",
        "file": SETTINGS,
        "old": "return self.guidance_scale if low < sigma <= high else 1.0",
        "new": "return self.guidance_scale if low < sigma <= high else 1.0001",
        "tests": [f"{LOOP_TESTS}::test_an_interval_runs_the_single_batch_outside_of_it"],
    },
    {
        "name": "the momentum of APG is forgotten",
        "file": PROGRAMS,
        "old": "            nonlocal average\n            D, average =",
        "new": "            D, _ =",
        "tests": [f"{LOOP_TESTS}::test_apg_carries_its_average_from_one_evaluation_to_the_next"],
    },
    {
        "name": "an old PNG's guidance below 1 is taken for what it says",
        "file": IMAGE_SETTINGS,
        "old": 'if "solver" not in found:',
        "new": "if False:",
        "tests": ["tests/test_images.py::test_a_png_from_before_there_were_solvers"],
    },
    {
        "name": "the noise of each batch begins again at index 0",
        "file": PIPELINE,
        "old": "first=i) for i in indices]",
        "new": "first=i) for i, _ in enumerate(indices)]",
        "tests": [f"{TESTS}::test_any_part_of_a_set_in_any_batches"],
    },
    {
        "name": "torch's noise is taken by position, not by index",
        "file": PIPELINE,
        "old": "whole = initial_noise(noise, seed, total, *shape)\n"
        "        return lambda indices: whole[list(indices)]",
        "new": "whole = initial_noise(noise, seed, total, *shape)\n"
        "        return lambda indices: whole[: len(indices)]",
        "tests": [f"{TESTS}::test_any_part_of_a_set_in_any_batches"],
    },
    {
        "name": "torch's noise is of the images asked for, not of the whole set",
        "file": PIPELINE,
        "old": "max(indices, default=-1) + 1 if total is None else total",
        "new": "max(indices, default=-1) + 1",
        "tests": [f"{TESTS}::test_noise_of_torch_is_that_of_the_whole_set"],
    },
    {
        "name": "the schedule of a network's own noise levels is ignored",
        "file": LOOP,
        "old": "sampler.plan(self.edm)",
        "new": "sampler.plan(EdmConfig())",
        "tests": [f"{TESTS}::test_equals_the_sampler_in_one_program"],
    },
    {
        "name": "the network's own sigma_max is ignored at the start",
        "file": PROGRAMS,
        "old": "solvers.start(noise, edm)",
        "new": "solvers.start(noise, EdmConfig())",
        "tests": [f"{TESTS}::test_equals_the_sampler_in_one_program"],
    },
    {
        "name": "the network's own sigma_data is ignored",
        "file": PROGRAMS,
        "old": "sigma_data=edm.sigma_data,",
        "new": "sigma_data=EdmConfig().sigma_data,",
        "tests": [f"{TESTS}::test_equals_the_sampler_in_one_program"],
    },
    {
        "name": "the scaling factor is divided out twice",
        "file": PIPELINE,
        "old": "latents / np.float32(self.codec.scaling_factor)",
        "new": "latents / np.float32(self.codec.scaling_factor) ** 2",
        "tests": [f"{TESTS}::test_the_codec_is_given_raw_latents_and_its_images_are_clipped"],
    },
    {
        "name": "images beyond [0, 1] are not clipped",
        "file": PIPELINE,
        "old": "np.clip(images / 2 + 0.5, 0, 1)",
        "new": "np.clip(images / 2 + 0.5, -1, 2)",
        "tests": [f"{TESTS}::test_the_codec_is_given_raw_latents_and_its_images_are_clipped"],
    },
    {
        "name": "the attention mask of token ids is dropped",
        "file": PIPELINE,
        "old": "self.text_encoder.encode(ids, attention_mask)",
        "new": "self.text_encoder.encode(ids)",
        "tests": [f"{TESTS}::test_the_attention_mask_goes_to_the_encoder"],
    },
    {
        "name": "previews of all batches are shown in the first one's place",
        "file": LOOP,
        "old": "preview(start, step,",
        "new": "preview(0, step,",
        "tests": [f"{TESTS}::test_previews_are_of_their_own_images"],
    },
    {
        "name": "a bar never ends",
        "file": LOOP,
        "old": "        next(ticks, None)  # a bar ends when it is asked for more\n",
        "new": "",
        "tests": [f"{TESTS}::test_a_batch_comes_before_the_next_is_begun"],
    },
    {
        "name": "guidance takes the zero caption for the prompt",
        "file": GUIDANCE,
        "old": "return F_both[:, 0], F_both[:, 1]",
        "new": "return F_both[:, 1], F_both[:, 0]",
        "tests": ["tests/test_sampling_guidance.py::test_guidance_by_hand"],
    },
    {
        "name": "captions of a guided batch do not alternate",
        "file": GUIDANCE,
        "old": "jnp.stack([first, second], axis=1)",
        "new": "jnp.stack([first, second], axis=0)",
        "tests": ["tests/test_sampling_guidance.py::test_guidance_by_hand"],
    },
    {
        "name": "the emoji network starts at the reference's guidance",
        "file": GUIDANCE,
        "old": "REFERENCE_SCALE if text_encoder.pretrained else EMOJI_SCALE",
        "new": "REFERENCE_SCALE",
        "tests": ["tests/test_sampling_guidance.py"],
    },
    {
        "name": "create_latent_diffusion ignores ema",
        "file": "microdit_jax/create.py",
        "old": "load_model(checkpoint, ema=ema, dtype=dtype, mesh=mesh, ema_length=ema_length)",
        "new": "load_model(checkpoint, dtype=dtype, mesh=mesh, ema_length=ema_length)",
        "tests": ["tests/test_create.py"],
    },
    {
        "name": "create.load ignores ema",
        "file": "microdit_jax/create.py",
        "old": "ema=ema, dtype=dtype, mesh=mesh, weights=weights, base=base",
        "new": "dtype=dtype, mesh=mesh, weights=weights, base=base",
        "tests": ["tests/test_create.py"],
    },
    {
        "name": "latents of held-out images are not scaled",
        "file": "microdit_jax/create.py",
        "old": "latents * np.float32(codec.scaling_factor)",
        "new": "latents",
        "tests": ["tests/test_create.py"],
    },
    {
        "name": "images are cut to bytes, not rounded",
        "file": IMAGES,
        "old": "np.round(np.clip(images, 0, 1) * 255)",
        "new": "np.floor(np.clip(images, 0, 1) * 255)",
        "tests": ["tests/test_images.py"],
    },
    {
        "name": "PNGs carry no settings",
        "file": IMAGES,
        "old": "    info.add_itxt(KEY, json.dumps(settings, ensure_ascii=False))\n",
        "new": "",
        "tests": ["tests/test_images.py"],
    },
    {
        "name": "an index beyond its set is taken from a PNG",
        "file": IMAGE_SETTINGS,
        "old": '_check_whole(values, "index", 0, values["of"] - 1)',
        "new": '_check_whole(values, "index", 0, 2**63)',
        "tests": ["tests/test_images.py"],
    },
    {
        "name": "true passes for the number 1 in a PNG",
        "file": IMAGE_SETTINGS,
        "old": "isinstance(value, int) and not isinstance(value, bool) and low <= value <= high",
        "new": "isinstance(value, int) and low <= value <= high",
        "tests": ["tests/test_images.py"],
    },
    {
        "name": "a torn PNG counts as made",
        "file": IMAGES,
        "old": "return found and read_png(path).size > 0",
        "new": "return found",
        "tests": ["tests/test_images.py"],
    },
    {
        "name": "a page's previews are those of other images",
        "file": STUDIO,
        "old": "for image in self._pipe.decode(latents)]",
        "new": "for image in self._pipe.decode(latents)[::-1]]",
        "tests": ["tests/test_app.py::test_previews_end_at_the_images"],
    },
    {
        "name": "a page is not told that its prompt is cut",
        "file": STUDIO,
        "old": "        if dropped:\n",
        "new": "        if False:\n",
        "tests": ["tests/test_app.py::test_a_prompt_that_is_cut_is_warned_of"],
    },
    {
        "name": "Stop waits until all images are sampled",
        "file": STUDIO,
        "old": "            if self._job.cancelled:\n",
        "new": "            if False:\n",
        "tests": ["tests/test_app.py::test_a_job_that_runs_stops_when_it_is_cancelled"],
    },
    # ------------------------------------------------------------------ editing and newer flags
    {
        "name": "--again forgets how much an image was changed",
        "file": COMMAND,
        "old": "model_flags.WEAKER, STRENGTH, IMAGE, MASK,",
        "new": "model_flags.WEAKER, IMAGE, MASK,",
        "tests": [AGAIN],
    },
    {
        "name": "--again forgets the mask",
        "file": COMMAND,
        "old": "model_flags.WEAKER, STRENGTH, IMAGE, MASK,",
        "new": "model_flags.WEAKER, STRENGTH, IMAGE,",
        "tests": [AGAIN],
    },
    {
        "name": "--again loads any weaker network that a file names",
        "file": COMMAND,
        "old": "        loaded[weaker] = settings.weaker",
        "new": "        pass",
        "tests": [AGAIN],
    },
    {
        "name": "the mask keeps what is white",
        "file": PROGRAMS,
        "old": "jnp.where(known.free > 0,",
        "new": "jnp.where(known.free < 1,",
        "tests": [f"{EDITING_TESTS}::test_what_the_mask_keeps_stays"],
    },
    {
        "name": "a latent with one white pixel stays",
        "file": EDITING,
        "old": "p, side // p, p).any(",
        "new": "p, side // p, p).all(",
        "tests": [f"{EDITING_TESTS}::test_a_latent_with_one_white_pixel_is_free"],
    },
    {
        "name": "the first steps are taken of an image, not the last",
        "file": SETTINGS,
        "old": "return levels[self.steps - max(round(self.strength * self.steps), 1) :]",
        "new": "return levels[: max(round(self.strength * self.steps), 1) + 1]",
        "tests": [f"{EDITING_TESTS}::test_strength_is_the_share_of_the_steps_that_are_taken"],
    },
    {
        "name": "churn forgets its bound",
        "file": CHURN,
        "old": "min(self.amount / num_steps, np.sqrt(2) - 1)",
        "new": "self.amount / num_steps",
        "tests": ["tests/test_sampling_churn.py::test_churn_is_algorithm_2"],
    },
    {
        "name": "autoguidance leads towards the weaker network",
        "file": GUIDANCE,
        "old": "return F_weak + scale *",
        "new": "return F_weak - scale *",
        "tests": [f"{STUDENT_TESTS}::test_autoguidance_leads_away_from_the_weaker_network"],
    },
    {
        "name": "a student takes any solver",
        "file": STUDENT,
        "old": "    if solver != STUDENT:",
        "new": "    if False:",
        "tests": [f"{STUDENT_TESTS}::test_what_a_student_does_not_take"],
    },
]
