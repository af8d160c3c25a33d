"""MDS datasets of latents to ArrayRecord ones (TFDS), and back; the same command again resumes.

Example:
  python -m microdit_jax.prepare.reformat --input=latents_mds --output=latents_ar --to=arrayrecord
  python -m microdit_jax.prepare.reformat --input=gs://bucket/latents --cache=/tmp/cache \\
      --output=latents_mds --to=mds --compression=zstd

The reference's datasets do not say which towers made them: add --vae and --text_encoder. Several
processes share the work: the same command on each, writing to one folder; each claims shard after
shard.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.prepare.reformat")

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tqdm

from microdit_jax.commands.parser import Parser
from microdit_jax.data.compression import parse_compression
from microdit_jax.data.records import SIDECAR, LatentInfo, Store, infer_info
from microdit_jax.data.stores import open_store
from microdit_jax.errors import UserError
from microdit_jax.files import atomic_folder, check_writable, output_folder, write_text
from microdit_jax.prepare import claims, job_folder, mds_writer

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
) -> None:
    """Writes the samples of a dataset, byte for byte, in the other format, in the same order.

    Args:
      input: an MDS or ArrayRecord dataset of latents; a folder, or for MDS also a URL.
      output: a folder; parts that an interrupted run of the same settings left there are kept.
      to: "mds" or "arrayrecord".
      vae, text_encoder, caption_tokens: towers that made the data, and l of its captions, for
        datasets without latents.json.
      compression: of MDS shards.
      process_index, process_count: this process begins with every process_count-th part.
      options: see `open_store`.
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
            parse_compression(compression)
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
    kind = _MdsOutput if to == "mds" else _ArrayRecordOutput
    dataset = kind(output, info, [len(part) for part in parts], compression)
    names = [dataset.path(number).name for number in range(len(parts))]
    begin: dict[str, Any] = {"process_index": process_index, "process_count": process_count}
    with (
        claims.Claims(output, names, **begin) as claimed,
        tqdm.tqdm(desc="reformatting", unit="shard", total=len(parts), disable=not progress) as bar,
    ):
        while left := claimed.left():
            bar.update(len(parts) - left - bar.n)
            for number in claimed.available():
                dataset.write(number, _samples(store, info, parts[number]))
                claimed.release(number)
                bar.update()
            if claimed.left():
                claims.wait_a_moment()
    claims.remove_leftovers(output)
    dataset.finish()


@dataclasses.dataclass(frozen=True)
class _Output:
    """A dataset that is written part by part."""

    folder: Path
    info: LatentInfo
    lengths: list[int]  # records of each part
    compression: str | None


class _MdsOutput(_Output):
    """An MDS dataset; each part is a folder with shards and an index, merged at the end."""

    def path(self, number: int) -> Path:
        """Returns the path that exists once a part is done."""
        return self.folder / f"{number:06}"

    def write(self, number: int, samples: Iterator[dict[str, bytes]]) -> None:
        """Writes one part, whole or not at all."""
        columns = dict.fromkeys(self.info.arrays, "bytes") | {"caption": "str", "id": "str"}
        with (
            atomic_folder(self.path(number), keep=self.path(number).exists) as folder,
            mds_writer.MdsWriter(
                folder, columns, compression=self.compression, size_limit=1 << 28
            ) as writer,
        ):
            for sample in samples:
                writer.write(sample)

    def finish(self) -> None:
        """Makes the parts one dataset."""
        write_text(self.folder / SIDECAR, self.info.to_json())
        mds_writer.merge_index(self.folder)


class _ArrayRecordOutput(_Output):
    """A TFDS dataset in ArrayRecord files; each part is one file."""

    def path(self, number: int) -> Path:
        """Returns the path that exists once a part is done."""
        return _arrayrecord_writer().shard_path(self.folder, number, len(self.lengths))

    def write(self, number: int, samples: Iterator[dict[str, bytes]]) -> None:
        """Writes one part, whole or not at all."""
        _arrayrecord_writer().write_shard(self.path(number), samples)

    def finish(self) -> None:
        """Makes the parts one dataset."""
        _arrayrecord_writer().write_metadata(self.folder, self.info, self.lengths)


def _arrayrecord_writer() -> ModuleType:
    from microdit_jax.prepare import arrayrecord_writer  # TFDS takes a while to import

    return arrayrecord_writer


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
    parser.add_argument("--vae", help="VAE that made the data, if latents.json is missing")
    parser.add_argument("--text_encoder", help="text tower that made the data, likewise")
    parser.add_argument(
        "--caption_tokens", type=int, default=77, help="tokens of a caption, likewise"
    )
    parser.add_argument("--records_per_shard", type=int, default=1000)
    parser.add_argument("--compression", help="of MDS shards: zstd, gz:6, ...")
    parser.add_argument("--cache", help="a local folder for shards fetched from a URL")
    parser.add_argument("--check_hashes", action="store_true", help="if an MDS dataset has them")
    parser.add_argument("--process_index", type=int, default=0, help="which of several processes "
        "this is: each begins with other shards")  # fmt: skip
    parser.add_argument("--process_count", type=int, default=1, help="how many begin together")
    return parser


def main(arguments: Sequence[str]) -> None:
    asked = vars(_parser().parse_args(arguments))
    check_writable(asked["output"], folder=True)
    with output_folder(asked["output"], drop=lambda name: ".mds" in name) as output:
        asked["output"] = output.path
        reformat(**asked)
    print(f"{output.name}: complete")
