"""The benchmark's model in files that peers read: a folder in Hugging Face's format, or a GGUF file, of the same weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from specdec.config import TargetConfig
from specdec.gguf_files import require_gguf
from specdec.loading import embedded_model_path
from specdec.model import PagedModel


def export_folder(model: PagedModel, folder: Path) -> Path:
    """`folder` with the model in its own dtype and its tokenizer, written once. The weights must not be packed."""

    def write(unfinished: Path) -> None:
        model.model.save_pretrained(unfinished)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(unfinished)

    return _once(folder, write)


def export_gguf(config: TargetConfig, path: Path) -> Path:
    """`path` with the weights of the target's GGUF file as they are run here: dequantized, rounded to bfloat16; written once.

    Raises ValueError where the target is no GGUF file or runs in another dtype.
    """
    source = Path(config.path or embedded_model_path()) / (config.gguf_file or "")
    if source.suffix != ".gguf" or not source.is_file():
        raise ValueError(
            f"llama.cpp reads GGUF files alone, and target.path={config.path} is none: leave that peer out"
        )
    if config.dtype not in ("auto", "bfloat16"):
        raise ValueError(
            f"llama.cpp runs a GGUF target in bfloat16, not target.dtype={config.dtype}: leave that peer out"
        )
    return _once(path, lambda unfinished: _write_bf16(source, unfinished))


def _write_bf16(source: Path, path: Path) -> None:
    require_gguf()
    import gguf

    reader = gguf.GGUFReader(source)
    architecture: Any = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    # The writer gives its own version of what describes the file itself.
    own = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, field in reader.fields.items():
        if not name.startswith(own):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        rounded = gguf.quants.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), bf16)
        if len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, rounded, raw_dtype=bf16)
        else:
            # llama.cpp wants vectors in float32; their values are the rounded ones all the same.
            writer.add_tensor(tensor.name, gguf.dequantize(rounded, bf16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _once(path: Path, write: Any) -> Path:
    """Written beside and renamed: what bears the name is whole."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        os.rename(unfinished, path)
    return path
