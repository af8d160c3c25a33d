"""MDS datasets of latents to ArrayRecord ones (TFDS), and back; the same command again resumes.

Example:
  python -m microdit_jax.prepare.reformat --input=latents_mds --output=latents_ar --to=arrayrecord
  python -m microdit_jax.prepare.reformat --input=gs://bucket/latents --cache=/tmp/cache \\
      --output=latents_mds --to=mds --compression=zstd

The reference's datasets do not say what made them: add --vae and --text_encoder. Several processes
share the work, each with its --process_index of --process_count, writing to one folder.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.prepare.reformat")

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tqdm

from microdit_jax.commands.parser import Parser
from microdit_jax.data.compression import split
from microdit_jax.data.records import SIDECAR, LatentInfo, Store, infer_info
from microdit_jax.data.stores import open_store
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_folder, check_writable, write_text
from microdit_jax.prepare import job_folder, mds_writer

FORMATS = ("mds", "arrayrecord")


def reformat(
    input: str,
    output: str | Path,
    *,
    to: str,
    vae: str | None = None,
    text_encoder: str | None = None,
    caption_tokens: int = 77,
    records_per_shard: int = 1000,
    compression: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
    **options: Any,
) -> bool:
    """Writes the samples of a dataset, byte for byte, in the other format, in the same order.

    Args:
      input: an MDS or ArrayRecord dataset of latents; a folder, or for MDS also a URL.
      output: a folder; what an interrupted run of the same settings left there is kept.
      to: "mds" or "arrayrecord".
      vae, text_encoder, caption_tokens: what made the data, where no latents.json says so.
      compression: of MDS shards.
      process_index, process_count: which of how many processes this is.
      options: see `open_store`.
    Returns:
      True if the output is complete; False while other processes still work.
    Raises:
      UserError: bad input, a damaged sample, or another job's folder.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, found {to!r}")
    job_folder.check_counts(process_index, process_count, records_per_shard=records_per_shard)
    if compression is not None and to != "mds":
        raise UserError("--compression is for --to=mds; leave it out")
    if compression is not None:
        try:
            split(compression)
        except ValueError as error:
            raise UserError(f"--compression: {error}") from error
    store, info = open_store(input, **options)
    if not len(store):
        raise UserError(f"expected records in {input}, found an empty dataset; nothing to reformat")
    if info is None:
        info = infer_info(store, vae=vae, text_encoder=text_encoder, caption_tokens=caption_tokens)
    output = Path(output)
    request = {
        "job": "reformat", "input": str(input), "records": len(store), "to": to,
        "records_per_shard": records_per_shard, "compression": compression,
        "info": dataclasses.asdict(info),
    }  # fmt: skip
    job_folder.begin(output, request)
    parts = [
        range(start, min(start + records_per_shard, len(store)))
        for start in range(0, len(store), records_per_shard)
    ]
    job = _Job(output, info, parts, compression)
    write, finish = (
        (job.write_mds, job.finish_mds)
        if to == "mds"
        else (job.write_array_record, job.finish_array_record)
    )
    mine = range(process_index, len(parts), process_count)
    for number in tqdm.tqdm(mine, "reformatting", unit="shard", disable=not progress):
        if not job.path(number, to).exists():
            write(number, _samples(store, info, parts[number]))
    complete = all(job.path(number, to).exists() for number in range(len(parts)))
    if complete:
        finish()
    return complete


@dataclasses.dataclass(frozen=True)
class _Job:
    """How parts and the finished dataset are written, in either format."""

    output: Path
    info: LatentInfo
    parts: list[range]
    compression: str | None

    def path(self, number: int, to: str) -> Path:
        """What stands there once a part is done."""
        if to == "mds":
            return self.output / f"{number:06}"
        from microdit_jax.prepare import arrayrecord_writer  # TFDS takes a while to import

        return arrayrecord_writer.shard_path(self.output, number, len(self.parts))

    def write_mds(self, number: int, samples: Iterator[dict[str, bytes]]) -> None:
        columns = dict.fromkeys(self.info.arrays, "bytes") | {"caption": "str", "id": "str"}
        with (
            atomic_folder(self.path(number, "mds")) as folder,
            mds_writer.MdsWriter(
                folder, columns, compression=self.compression, size_limit=1 << 28
            ) as writer,
        ):
            for sample in samples:
                writer.write(sample)

    def finish_mds(self) -> None:
        write_text(self.output / SIDECAR, self.info.to_json())
        mds_writer.merge_index(self.output)

    def write_array_record(self, number: int, samples: Iterator[dict[str, bytes]]) -> None:
        from microdit_jax.prepare import arrayrecord_writer

        arrayrecord_writer.write_shard(self.path(number, "arrayrecord"), samples)

    def finish_array_record(self) -> None:
        from microdit_jax.prepare import arrayrecord_writer

        arrayrecord_writer.write_metadata(
            self.output, self.info, [len(part) for part in self.parts]
        )


def _samples(store: Store, info: LatentInfo, indices: range) -> Iterator[dict[str, bytes]]:
    """Yields the stored bytes of each record, its byte counts checked."""
    for index in indices:
        raw = store.raw(index)
        sample = {"id": str(index).encode()}
        for name in ("caption", "id"):
            if name in raw:
                sample[name] = bytes(raw[name])
        for name, column in info.arrays.items():
            sample[name] = bytes(raw[name])
            if len(sample[name]) != column.nbytes:
                raise UserError(
                    f"expected {column.nbytes} bytes of {name} in {store.where(index)}, found "
                    f"{len(sample[name])}; the dataset mixes shapes"
                )
        yield {"caption": b""} | sample


def _parser() -> Parser:
    parser = Parser("microdit_jax.prepare.reformat", __doc__)
    parser.add_argument("--input", required=True, help="a dataset of latents; a folder or a URL")
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument("--vae", help="what VAE made the data, if they do not say")
    parser.add_argument("--text_encoder", help="what text tower, likewise")
    parser.add_argument("--caption_tokens", type=int, default=77, help="a caption's, likewise")
    parser.add_argument("--records_per_shard", type=int, default=1000)
    parser.add_argument("--compression", help="of MDS shards: zstd, gz:6, ...")
    parser.add_argument("--cache", help="a local folder for shards fetched from a URL")
    parser.add_argument("--check_hashes", action="store_true", help="if an MDS dataset has them")
    parser.add_argument("--process_index", type=int, default=0, help="which process this is")
    parser.add_argument("--process_count", type=int, default=1, help="how many share the work")
    return parser


def main(arguments: Sequence[str]) -> None:
    asked = vars(_parser().parse_args(arguments))
    check_writable(asked["output"], folder=True)
    complete = reformat(**asked)
    state = "complete" if complete else "other processes still write"
    print(f"{asked['output']}: {state}")
