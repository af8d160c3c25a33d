"""Opens the data that a run configuration names, and checks that it fits the network."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from microdit_jax.assets import load
from microdit_jax.data import pipeline, twemoji
from microdit_jax.data.latents import LatentSource, load_prepared
from microdit_jax.data.pipeline import Record, Source
from microdit_jax.data.records import StoredLatents
from microdit_jax.data.stores import open_latents
from microdit_jax.encoders.patch_pca import PatchPCA
from microdit_jax.errors import LONGEST, UserError, visible
from microdit_jax.machine import hosts, memory
from microdit_jax.models.dit import DiTConfig
from microdit_jax.prepare.emoji_set import prepare_emoji_set
from microdit_jax.training import rules
from microdit_jax.training.caption_tower import CaptionTower, batch_key

# Keys of a record that a batch holds, beside its captions
RECORD_KEYS = ("latents", "index")

Opened = StoredLatents | LatentSource  # a dataset, which knows its towers


class RunData(NamedTuple):
    """Datasets of a run.

    Attributes:
      sources, weights: for `pipeline.make_dataset`; a record's "source" is its index in `names`.
      names: folders of the sources.
      heldout: records that training does not see.
      made_by: names of the "vae" and the "text_encoder" of all of them.
      tower: embeds the captions of records that hold "tokens", else None.
      codec: folder of the codec if it was fitted to images, these or others, else None.
      attribution: to be shown with samples, as the data's licence asks.
    """

    sources: list[Source]
    weights: list[float]
    names: list[str]
    heldout: Opened
    made_by: dict[str, str]
    tower: CaptionTower | None
    codec: Path | None
    attribution: str

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Keys of the arrays of a batch that go to the devices."""
        return ("latents", batch_key(self.tower), "keep_caption")

    def check_batch(self, batch: Record) -> None:
        """Raises UserError for token ids outside the tower's vocabulary."""
        if self.tower is not None:
            self.tower.check(batch["tokens"])

    def facts(self) -> dict[str, Any]:
        """Returns what all processes must find in their datasets (machine.agreement)."""
        names = (*self.names, "data.heldout")
        sources = (*self.sources, self.heldout)
        sizes = {f"records of {n}": len(s) for n, s in zip(names, sources, strict=True)}
        towers = {f"{kind} of the data": name for kind, name in self.made_by.items()}
        return sizes | towers

    def heldout_caption(self, index: int) -> str:
        """Returns the caption of a held-out record."""
        if isinstance(self.heldout, LatentSource):
            return self.heldout.captions[index]
        return self.heldout[index]["caption"]

    def batches(self, config: ConfigDict, start: int) -> Iterator[Record]:
        """Yields this process's part of the batches of steps `start` + 1, `start` + 2, ...

        Raises:
          UserError: a batch needs more memory than this host has.
        """
        values = (value for value in self.sources[0][0].values() if not isinstance(value, str))
        share = config.train.batch_size // jax.process_count()
        memory.check_host(
            share * sum(np.asarray(value).nbytes for value in values),
            what=f"a batch of train.batch_size={config.train.batch_size}",
            fix="take a smaller one",
        )
        dataset = pipeline.make_dataset(
            self.sources,
            self.weights,
            seed=config.seed,
            batch_size=config.train.batch_size,
            caption_drop=config.data.caption_drop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return pipeline.batches(dataset, start, threads=config.data.threads)


class _Numbered:
    """The arrays of a source, without texts, and with the source's number in each record."""

    def __init__(self, source: Source, number: int, captions: str):
        self._source, self._number = source, np.int32(number)
        self._names = (*RECORD_KEYS, captions)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        return {name: record[name] for name in self._names} | {"source": self._number}

    def rows(self, indices: Int[np.ndarray, " n"]) -> Record:
        numbers = np.full(len(indices), self._number)
        return pipeline.rows(self._source, indices, self._names) | {"source": numbers}


def load_data(config: ConfigDict, mesh: Mesh) -> RunData:
    """Opens the datasets of a run; prepares the embedded emoji images on first use.

    Args:
      config: checked by `training.config.check`.
      mesh: devices of the text tower, if the run embeds captions itself.
    Raises:
      UserError: a dataset that does not open, or that other towers made.
    """
    entries = [dict(entry) for entry in config.data.datasets]
    heldout_entry = config.data.heldout.to_dict()
    if whole := config.data.folder:
        entries = [{"source": "latents", "folder": whole, "weight": 1.0}]
        heldout_entry = entries[0]
    tower = None
    if config.data.captions == "tokens":
        tower = CaptionTower(config.data.text_encoder, config.model.options.dtype, mesh)
    opened = [_open(config, entry, "train", tower) for entry in entries]
    if whole:
        opened, heldout = _split(opened[0], whole, config.data.heldout_share)
    else:
        heldout = _open(config, heldout_entry, "heldout", tower)
    made_by = {"vae": heldout.vae, "text_encoder": heldout.text_encoder}
    for source in opened:
        source.check_made_by(**made_by)
    notes = [source.info.attribution for source in opened if isinstance(source, StoredLatents)]
    has_codec = heldout_entry["source"] in twemoji.SETS
    if has_codec:
        notes.append(twemoji.ATTRIBUTION)
    return RunData(
        [_Numbered(source, i, batch_key(tower)) for i, source in enumerate(opened)],
        [entry["weight"] * len(source) for entry, source in zip(entries, opened, strict=True)],
        [entry["folder"] for entry in entries],
        heldout,
        made_by,
        tower,
        Path(heldout_entry["folder"]) / "codec" if has_codec else _small_codec(config.data.vae),
        "; ".join(dict.fromkeys(note for note in notes if note)),
    )


def _small_codec(vae: str) -> Path | None:
    """Returns the folder of a codec that was fitted to images; a run keeps a copy of it."""
    return Path(vae) if (Path(vae) / "codec.json").is_file() else None


def _split(whole: Opened, name: str, share: float) -> tuple[list[Opened], Opened]:
    """Holds out every so many of a folder's records, the same ones at each start."""
    assert isinstance(whole, StoredLatents)  # as load_data opens folders
    count = round(len(whole) * share)
    if not 1 <= count < len(whole):
        raise UserError(
            f"data.heldout_share must hold out one record or more of {name} and leave one, found "
            f"{share} of {len(whole)}; give another share, or more images"
        )
    held = {int(i) for i in np.linspace(0, len(whole) - 1, count + 2)[1:-1]}
    held |= set(range(count - len(held)))  # where rounding has met twice
    kept = [i for i in range(len(whole)) if i not in held]
    return [whole.part(kept)], whole.part(sorted(held))


def _open(
    config: ConfigDict, entry: dict[str, Any], split: str, tower: CaptionTower | None
) -> Opened:
    if entry["source"] in twemoji.SETS:
        return _open_emoji(config, entry["folder"], split, *twemoji.SETS[entry["source"]])
    return _open_latents(config, entry["folder"], tower)


def _open_latents(config: ConfigDict, folder: str, tower: CaptionTower | None) -> StoredLatents:
    """Opens stored latents, MDS or ArrayRecord; each folder is one split."""
    data = config.data
    source = open_latents(
        folder,
        resolution=data.resolution,
        **load.names_in_data(data.vae, data.text_encoder),
        captions=data.captions,
        tokenizer=tower and tower.tokenizer,
        **(_from_a_store(data) if "://" in folder else {}),
    )
    if source.way and jax.process_index() == 0:
        print(visible(f"{folder}: {source.way}", LONGEST), flush=True)
    return source


def _from_a_store(data: ConfigDict) -> dict[str, Any]:
    return {"cache": data.cache or None, "cache_bytes": data.cache_bytes, "shuffled": True}


def _open_emoji(
    config: ConfigDict, folder: str, split: str, rule: str, untoned: bool
) -> LatentSource:
    """Opens the embedded emoji images, whose folder process 0 prepares on first use.

    Half of all emoji images are people in five skin tones. Mixed with the whole set, the part whose
    captions name none makes the rest more frequent.
    """
    match = re.fullmatch(rules.PATCH_PCA, config.data.vae)
    assert match is not None  # as rules.check_datasets has made sure
    patch, channels, resolution = map(int, match.groups())

    def prepare():
        prepare_emoji_set(
            Path(folder),
            resolution=config.data.resolution,
            fit_codec=PatchPCA.fit,
            codec_settings={"patch": patch, "channels": channels},
            text_encoder=load.load_text_encoder(config.data.text_encoder),
            codec_resolution=resolution,
            heldout=rule,
        )

    hosts.from_first("prepare the emoji images", prepare)
    train, heldout, *_ = load_prepared(Path(folder), PatchPCA.load)
    images = train if split == "train" else heldout
    if untoned:
        images = images.subset(["skin tone" not in caption for caption in images.captions])
    return images


def check_data(cfg: DiTConfig, data: RunData) -> int:
    """Checks the first record of each dataset against the network.

    Returns:
      The number l of tokens of a caption.
    Raises:
      UserError: latents or captions of another shape, or captions of several lengths.
    """
    expected, lengths = (cfg.input_size, cfg.input_size, cfg.in_channels), set()
    for name, source in zip(
        (*data.names, "data.heldout"), (*data.sources, data.heldout), strict=True
    ):
        record = source[0]
        if record["latents"].shape != expected:
            raise UserError(
                f"the model takes latents {expected}, found {record['latents'].shape} in {name}; "
                "set model.options.input_size and in_channels, or prepare data of that size"
            )
        if data.tower is None:
            length, width = record["caption_latents"].shape
        else:
            length, width = len(record["tokens"]), data.tower.width
        if width != cfg.caption_channels:
            raise UserError(
                f"the model takes caption embeddings {cfg.caption_channels} wide, found {width} in "
                f"{name}; set model.options.caption_channels"
            )
        lengths.add(length)
    if len(lengths) > 1:
        raise UserError(
            f"all datasets must have captions of the same length, found {sorted(lengths)} tokens"
        )
    return lengths.pop()
