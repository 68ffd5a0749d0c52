"""Models of the Hugging Face hub, in the cache that all programs share."""

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.errors import ModelUnavailable
from engine.machine import processors

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

log = logging.getLogger(__name__)


def fetch(model: str) -> Path:
    """The folder of owner/name or owner/name@revision, downloaded unless it is here, and checked.

    Raises ModelUnavailable.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = model.partition("@")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=_WANTED, local_files_only=True
        )
    except Exception:  # noqa: BLE001 - not cached: the hub's own errors differ by version
        try:
            folder = snapshot_download(name, revision=revision or None, allow_patterns=_WANTED)
        except Exception as error:
            raise ModelUnavailable(
                f"cannot download {model} from the Hugging Face hub ({_reason(error)}); give a "
                "local folder or .gguf file to --model instead"
            ) from error
    _mend(Path(folder), name)
    return Path(folder)


def _mend(snapshot: Path, name: str) -> None:
    """Download again what is not what the hub has. Raises ModelUnavailable."""
    from huggingface_hub import hf_hub_download

    altered = _altered(snapshot)
    for file in altered:
        log.warning("%s is not as it was downloaded; downloading it again", file)
        try:
            hf_hub_download(
                name,
                file.relative_to(snapshot).as_posix(),
                revision=snapshot.name,
                force_download=True,
            )
        except Exception as error:
            raise ModelUnavailable(
                f"{file} is not as it was downloaded, and cannot be downloaded again "
                f"({_reason(error)})"
            ) from error
    if altered and (still := _altered(snapshot)):
        raise ModelUnavailable(f"{still[0]} is not what the Hugging Face hub names it by")


def _altered(snapshot: Path) -> list[Path]:
    """The files whose content is not the one they are named by.

    They are links to files that are named by their SHA-256 if they are large, else as git does.
    Where a file system has no links, nothing is known of them.
    """
    names = [*_WANTED, "pytorch_model*.bin"]  # other programs fetch these
    links = [path for name in names for path in snapshot.rglob(name) if path.is_symlink()]
    with ThreadPoolExecutor(min(processors(), 8)) as pool:
        return [
            path for path, whole in zip(links, pool.map(_is_whole, links), strict=True) if not whole
        ]


def _is_whole(link: Path) -> bool:
    blob = link.readlink().name
    kinds = {64: hashlib.sha256(), 40: hashlib.sha1(usedforsecurity=False)}
    digest = kinds.get(len(blob))
    if digest is None or not set(blob) <= set("0123456789abcdef"):
        return True
    try:
        with link.open("rb") as file:
            if len(blob) == 40:
                digest.update(f"blob {link.stat().st_size}\0".encode())
            while data := file.read(1 << 20):
                digest.update(data)
    except OSError:
        return False
    return digest.hexdigest() == blob


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
