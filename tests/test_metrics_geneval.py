import json
import re
from pathlib import Path

import pytest

from microdit_jax.errors import UserError
from microdit_jax.metrics import geneval

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "counting", "include": [], "exclude": [], "prompt": "two cups"},
    {"tag": "colors", "include": [], "prompt": "a red car"},
]


def write_lines(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def official_reader(folder: Path):
    """The images that the benchmark's evaluate_images.py visits, with their metadata."""
    found = []
    for sub in sorted(folder.iterdir()):
        if not sub.is_dir() or not sub.name.isdigit():
            continue
        metadata = json.loads((sub / "metadata.jsonl").read_text())
        for image in sorted((sub / "samples").iterdir()):
            if re.match(r"\d+\.png", image.name):
                found.append((image, metadata))
    return found


def result(tag: str, correct: bool, prompt: str) -> dict:
    return {
        "filename": "x.png", "tag": tag, "prompt": prompt, "correct": correct,
        "reason": "", "metadata": json.dumps({"tag": tag, "prompt": prompt}), "details": "{}",
    }  # fmt: skip


def test_the_folder_is_the_benchmarks_own(tmp_path):
    prompts = geneval.read_prompts(write_lines(tmp_path / "prompts.jsonl", PROMPTS))
    assert prompts == PROMPTS
    folder = tmp_path / "images"
    geneval.write_metadata(folder, prompts)
    written = [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.jsonl"))]
    geneval.write_metadata(folder, prompts)  # the same again, which touches none
    assert written == [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.jsonl"))]
    for index in range(len(prompts) * geneval.SAMPLES):
        path = geneval.image_path(folder, index)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert (folder / "00001/samples/0003.png").exists()
    found = official_reader(folder)
    assert len(found) == 12
    assert [metadata for _, metadata in found] == [p for p in PROMPTS for _ in range(4)]
    with pytest.raises(UserError, match="00000/metadata.jsonl to hold .*another prompt"):
        geneval.write_metadata(folder, prompts[1:])
    with pytest.raises(UserError, match=r"expected 2 prompts in .*found more \(00002\)"):
        geneval.write_metadata(folder, prompts[:2])


def test_scores_by_hand(tmp_path):
    lines = [
        result("colors", True, "a"), result("colors", False, "a"), result("colors", False, "b"),
        result("single_object", True, "c"), result("colors", False, "b"),
    ]  # fmt: skip
    found = geneval.scores(write_lines(tmp_path / "results.jsonl", lines))
    assert found.tasks == {"single_object": 1.0, "colors": 0.25}
    assert found.overall == 0.625
    assert (found.images, found.prompts) == (5, 3)
    assert found.correct_images == 0.4 and found.correct_prompts == pytest.approx(2 / 3)


def test_bad_files(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(UserError, match="file of JSON lines at .*No such file"):
        geneval.scores(path)
    path.write_text("not json\n")
    with pytest.raises(UserError, match="file of JSON lines"):
        geneval.scores(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="JSON objects, one a line"):
        geneval.scores(path)
    write_lines(path, [PROMPTS[0], {"tag": "sounds", "prompt": "a bang"}])
    with pytest.raises(UserError, match='found line 2: {"tag": "sounds"'):
        geneval.read_prompts(path)
    with pytest.raises(UserError, match="tag, correct, metadata in .*found line 1"):
        geneval.scores(path)
