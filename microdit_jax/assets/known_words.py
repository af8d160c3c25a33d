"""The words that a network on the embedded images knows: those of its training captions."""

import functools
from collections.abc import Container, Sequence

from microdit_jax.assets.load import Model
from microdit_jax.checkpoints.run import read_run_metadata
from microdit_jax.data import emoji_scenes, twemoji
from microdit_jax.encoders import registry
from microdit_jax.encoders.word_vectors import NearWords, plain
from microdit_jax.errors import visible


def emoji_sets(model: Model) -> dict[str, tuple[str, ...]]:
    """Returns which sets of the embedded images a run trains on and holds out, by split.

    They are those of `data.twemoji.sets_of`; DEFAULT_SETS for a network of another origin.
    """
    if model.folder is None:
        return twemoji.DEFAULT_SETS
    return twemoji.sets_of(read_run_metadata(model.folder, "config.data")["config"]["data"])


def of_model(model: Model) -> Container[str] | None:
    """Returns the words that a network on the embedded images can know: those of its captions.

    Others have vectors of a random table, which say nothing, not even what a word like them would;
    or vectors of words, which say as much as a word of a caption is similar.

    Returns:
      None if all words may mean something: by a pretrained text encoder, or in other data.
    """
    if model.folder is None or not registry.is_text_encoder(model.text_encoder or ""):
        return None
    needed = "config.data.heldout.source"
    source = read_run_metadata(model.folder, needed)["config"]["data"]["heldout"]["source"]
    if source not in twemoji.SETS:
        return None
    table = (model.text_encoder or "").startswith("table:")
    return _of_sets(emoji_sets(model)["train"], table)


@functools.lru_cache(maxsize=4)
def _of_sets(train: tuple[str, ...], table: bool) -> Container[str]:
    """Returns the words of sets' captions, collected once: a pipeline and its command both ask."""
    captions = [image.caption for image in twemoji.images_of_sets("train", {"train": train})]
    words = {word for caption in captions for word in caption.split()}
    if "twemoji_scenes" in train:
        words |= emoji_scenes.words(captions)
    return frozenset(words) if table else NearWords(words)


def notes(known: Container[str] | None, prompts: Sequence[str]) -> list[str]:
    """Returns what a person should be told of the words of prompts that a network does not know.

    Args:
      known: as `of_model` returns them.
    """
    if known is None:
        return []
    words = [word for prompt in prompts for word in twemoji.caption_of(prompt).split()]
    words = list(dict.fromkeys(words))
    unknown = [word for word in words if word not in known]
    found = []
    if isinstance(known, NearWords):
        near = {word: known.nearest(word) for word in words}
        read = [f"{word} as {own}" for word, own in near.items() if own not in (None, plain(word))]
        if read:
            found.append(f"words read as those that the model knows: {_shown(read)}")
    if unknown:
        found.append(
            f"this model has seen no image of these words, which say nothing: {_shown(unknown)}"
        )
    return found


def _shown(words: Sequence[str]) -> str:
    return visible(", ".join(words), most=1000)
