"""Puts a network of one's own on the Hugging Face Hub: its weights, a model card, its samples.

The files are first written to a folder, to be looked at: the card there may be edited, and the same
command again sends what lies in the folder. With --dry_run nothing is sent.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command("microdit_jax.assets.publish")

import argparse
import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from microdit_jax.commands.parser import Parser
from microdit_jax.convert.model_card import TO_DO, describe_model, model_card
from microdit_jax.convert.networks import is_ours
from microdit_jax.convert.to_file import write_adapters, write_weights
from microdit_jax.errors import MORE, UserError, visible
from microdit_jax.files import check_writable, disk_errors, write_text

EXAMPLE = """example:
  python -m microdit_jax.assets.publish --input=runs/photos --repository=OWNER/NAME --dry_run
  python -m microdit_jax.assets.publish --input=runs/photos --repository=OWNER/NAME --create
"""
WEIGHTS, ADAPTERS, CARD, SAMPLES, CODEC = (
    "dit.safetensors", "adapters.safetensors", "README.md", "samples.png", "vae",
)  # fmt: skip
CODEC_FILES = ("codec.json", "codec.npz")


def main(arguments: Sequence[str]) -> None:
    """The command; `arguments` without the program's name."""
    parser = Parser("microdit_jax.assets.publish", __doc__, EXAMPLE)
    add = parser.add_argument
    add("--input", required=True, type=Path, help="a run, a folder by convert, or instant")
    add("--repository", required=True, help="OWNER/NAME on the hub")
    add("--output", type=Path, help="folder for the files (default: out/publish/NAME)")
    add("--adapters", action="store_true", help="of a run that trained adapters, these alone")
    add("--weights", choices=("model", "ema"), help="of a run (default: its average if it has one)")
    add("--base", type=Path, help="model that a run's adapters belong to, if not the package's")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights sent")
    add("--images", type=Path, help="samples.png of sample_main.py, shown in the card")
    add("--license", default="", help="as the hub names it, such as apache-2.0; for the card")
    add("--create", action="store_true", help="make the repository if there is none")
    add("--private", action="store_true", help="with --create: for its owner alone")
    add("--dry_run", action="store_true", help="write the folder and send nothing")
    flags = parser.parse_args(arguments)
    check_repository(flags.repository)
    if flags.private and not flags.create:
        raise UserError("--private goes with --create; give both, or leave it out")
    if not is_ours(flags.input):
        raise UserError(
            f"expected a training run or a converted network at {visible(flags.input)}, found "
            "something else; convert it first: python -m convert --help"
        )
    folder = flags.output or Path("out/publish") / flags.repository.partition("/")[2]
    check_writable(folder, folder=True)
    jax.config.update("jax_platforms", "cpu")  # a file on its way to a file needs no device
    if not flags.dry_run:
        find_repository(flags.repository, create=flags.create, private=flags.private)
    files = write_folder(flags, folder)
    for file in files:
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file.relative_to(folder)}")
    notes = (folder / CARD).read_text().count(TO_DO)
    if notes:
        print(f"{folder / CARD} has {notes} questions to you; answer them in that file")
    if flags.dry_run:
        print(f"nothing was sent; look at {folder}, then leave out --dry_run")
        return
    print(f"sent: {send(flags.repository, folder, files)}")


def write_folder(flags: argparse.Namespace, folder: Path) -> list[Path]:
    """Writes what is to be sent, but what is there already; returns the files."""
    about = describe_model(flags.input, flags.weights)
    name = ADAPTERS if flags.adapters else WEIGHTS
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name]
        if not flags.adapters:
            write_weights(
                flags.input, folder / name, weights=flags.weights, base=flags.base,
                dtype=flags.dtype,
            )  # fmt: skip
        elif not (folder / name).exists():
            write_adapters(flags.input, folder / name, weights=flags.weights, dtype=flags.dtype)
        if about.codec is not None and not flags.adapters:
            (folder / CODEC).mkdir(exist_ok=True)
            for part in CODEC_FILES:
                files.append(Path(shutil.copy(about.codec / part, folder / CODEC)))
        if flags.images is not None:
            files.append(Path(shutil.copy(flags.images, folder / SAMPLES)))
        elif (folder / SAMPLES).is_file():
            files.append(folder / SAMPLES)
    if not (folder / CARD).exists():  # else its author may have edited it
        card = model_card(
            about, name, adapters=flags.adapters, repository=flags.repository,
            license=flags.license, image=SAMPLES if folder / SAMPLES in files else "",
        )  # fmt: skip
        write_text(folder / CARD, card)
    return [folder / CARD, *files]


# ------------------------------------------------------------------ the hub
def check_repository(name: str) -> None:
    """Raises UserError unless a name is OWNER/NAME as the hub takes it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(name)
        if name.count("/") == 1:
            return
    raise UserError(
        f"expected --repository=OWNER/NAME, of letters, digits, '-', '_' and '.', found "
        f"{visible(name, 100)}; correct it"
    )


def find_repository(name: str, *, create: bool, private: bool) -> None:
    """Raises UserError unless there is a token, and a repository that can be seen with it.

    Args:
      create: make the repository if there is none.
    """
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            "expected a token of the Hugging Face Hub that may write, found none; make one at "
            "huggingface.co/settings/tokens, then set HF_TOKEN or run hf auth login; --dry_run "
            "needs none"
        )
    with _hub_errors(name):
        if create:
            huggingface_hub.HfApi().create_repo(name, private=private, exist_ok=True)
        else:
            huggingface_hub.HfApi().repo_info(name)


def send(repository: str, folder: Path, files: Sequence[Path]) -> str:
    """Uploads files of a folder in one commit; returns its address."""
    import huggingface_hub

    with _hub_errors(repository):
        done = huggingface_hub.HfApi().create_commit(
            repository,
            [
                huggingface_hub.CommitOperationAdd(f"{file.relative_to(folder).as_posix()}", file)
                for file in files
            ],
            commit_message="Weights and model card, by microdit_jax",
        )
    return done.commit_url


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns what the hub's library raises into UserError; all else passes."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # the error below says what came of all attempts
    try:
        yield
    except Exception as error:
        if (why := _why(error)) is None:
            raise
        raise UserError(
            f"could not send {visible(repository)} to the Hugging Face Hub: {why}; {MORE}"
        ) from error


def _why(error: BaseException) -> str | None:
    """Returns what went wrong and the fix; None for what is no fault of the hub or the network."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    names = {type(e).__name__ for e in chain}
    codes = [getattr(getattr(e, "response", None), "status_code", None) for e in chain]
    code = next((c for c in codes if c), 0)
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set; unset it"
    if code in (401, 403):
        return f"the token may not write there (status {code}); make one with the right to write"
    if "RepositoryNotFoundError" in names or code == 404:
        return "there is no such repository; check its name, or add --create"
    if code:
        said = visible(str(chain[-1]).split("\n")[0], 200)
        return f"it answers with status {code} ({said}); try again later"
    # httpx and requests have errors of their own, which are no OSErrors in every version.
    network = any(type(e).__module__.startswith(("httpx", "httpcore", "requests")) for e in chain)
    if network or any(isinstance(e, ConnectionError | TimeoutError) for e in chain):
        return f"no connection ({visible(chain[-1], 200)}); check the network, then try again"
    return None
