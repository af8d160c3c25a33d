"""Reasons why some commands of the docs are not run as written.

A command that no line names is run by `make test-commands`. Each line must name at least one.
"""

import re
from typing import NamedTuple

from tools.doc_commands.pages import Command

REASONS = {
    "placeholder": "a name in it is the reader's to fill in",
    "download": "needs files from the network, or packages",
    "input": "needs a dataset or a checkpoint that only its owner has",
    "accelerator": "needs a GPU, or as many devices",
    "cluster": "needs several machines or a scheduler",
    "hours": "takes hours",
    "own target": "is a target of the Makefile, or another tool, with tests of its own",
    "root": "needs root, or kills processes",
}


class Rule(NamedTuple):
    """Commands that are not run: those whose text the pattern is found in."""

    reason: str
    pattern: str

    def applies(self, command: Command) -> bool:
        """Returns True if the rule names this command."""
        return re.search(self.pattern, command.text) is not None


RULES = (
    Rule("placeholder", r"\.\.\.|\b(FILE|FOLDER|NAME|REGISTRY|IMAGE)\b|VENV_"),
    Rule("placeholder", r"^python -m$|captions_as=tokens$|--find$"),
    Rule("placeholder", r"FOLDER_OF_A_CHECKOUT|path/to/micro_diffusion_checkout"),
    Rule("download", r"dit_(4|16)_channel"),
    Rule("download", r"^(curl|hf|img2dataset)\b|curl -[oO]|docker (build|run)"),
    Rule("download", r"^pip install|pip install |text_encoder=minilm|source=openmoji"),
    Rule("download", r"--input=photos .*--resolutions=256,512"),  # a VAE
    Rule("download", r"microdit_jax\.xla\.aot|microdit_jax\.xla\.plot.*--reports=out"),
    Rule("input", r"(data|latents)/(cc12m|sa1b|journeydb|diffusiondb|textcaps|coco2014)"),
    Rule("input", r"^sed -i|^cd \.\./\.\."),
    Rule("input", r"=dit\.pt --output|--input=models/dit|runs/stage4"),
    Rule("input", r"stable-diffusion-xl-base|DFN5B-CLIP|t5-v1_1-xxl|pt_inception|CLIP-ViT-H"),
    Rule("input", r"--input=all-MiniLM"),
    Rule("accelerator", r"configs/recipe\.py:mesh=-1x8x1|configs/res_256_pretrain\.py --workdir"),
    Rule("accelerator", r"configs/recipe\.py --workdir"),
    Rule("cluster", r"sbatch|xpk |gcloud |coordinator_address"),
    Rule("hours", r"configs/instant2?\.py|configs/distill\.py|out/instant2?/|out/student"),
    Rule("hours", r"benchmarks\.(captions|instant2|sampling|slow_store|race)\b"),
    Rule("hours", r"benchmarks\.(loop_overhead|against_reference)\b"),
    Rule("hours", r"microdit_jax\.xla\.bench --what"),
    Rule("own target", r"^make (?!demo)|^eval .*make"),
    Rule("own target", r"tools\.(damage|word_vectors)|tests/test_|fuzz\.replay|pre-commit"),
    Rule("root", r"tools\.faults"),
)  # fmt: skip


def reason(command: Command) -> str:
    """Returns why a command is not run; "" for one that is."""
    for rule in RULES:
        if rule.applies(command):
            return rule.reason
    return ""
