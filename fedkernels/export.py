"""The trained model of a run as a directory that `transformers` or `peft` load."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .data.tokens import LibraryTokenizer, Tokens
from .models import TransformerModule
from .run_folder import load_model


def export(run_dir: Path, to: Path, *, merge: bool = False) -> str:
    """Write a run's final model as `save_pretrained` does, with its tokenizer where it has one of its own.

    Adapters become a directory for `peft`, which names the base by the directory it came from; a base that came from
    none lies in `base` beside them. The directory appears whole or not at all.

    Args:
        run_dir: folder of a finished run.
        to: directory to make; it must not exist, or be empty.
        merge: add adapters into the base, for a directory that needs no `peft`.

    Returns:
        The class that loads the directory.

    Raises:
        FileNotFoundError: the run has no final model, or the directory its base came from is gone.
        ValueError: the model is not one of `transformers`, has no adapters to merge, or `to` has files in it.
    """
    if not (run_dir / "model.json").is_file():
        raise FileNotFoundError(f"run_dir: {run_dir} has no model.json; a run writes it when it ends")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"to: {to} exists already; choose another name")
    facts = json.loads((run_dir / "model.json").read_text())
    name = facts["model"]["name"]
    module = load_model(run_dir)
    if not isinstance(module, TransformerModule):
        loader = "fedkernels.run_folder.load_model"
        raise ValueError(f"run_dir: the {name} of {run_dir} is no model of transformers; {loader} loads it")
    if merge and not module.adapted:
        raise ValueError(f"merge: the {name} of {run_dir} has no adapters; it was trained without model.lora")
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as folder:
        whole = Path(folder) / "model"
        loader = _save(module, facts, whole, to, merge=merge)
        tokens = Tokens(**facts["tokens"])
        if tokens.path is not None:
            LibraryTokenizer(tokens.path).save(whole)
        if to.exists():
            to.rmdir()
        os.replace(whole, to)
    return loader


def _save(module: TransformerModule, facts: dict[str, Any], folder: Path, to: Path, *, merge: bool) -> str:
    auto = {"image": "ImageClassification", "language": "CausalLM", "text": "SequenceClassification"}[facts["kind"]]
    if not module.adapted or merge:
        model = module.model.merge_and_unload() if merge else module.model
        model.save_pretrained(folder)
        return f"transformers.AutoModelFor{auto}"
    adapters = module.model.peft_config["default"]
    base = facts["model"].get("path")
    adapters.base_model_name_or_path = str(to.resolve() / "base") if base is None else str(Path(base).resolve())
    module.model.save_pretrained(folder, save_embedding_layers=False)
    if base is None:
        # Taken off last, for nothing of the adapters is left in the model after it.
        module.model.unload().save_pretrained(folder / "base")
    return f"peft.PeftModel on transformers.AutoModelFor{auto}"
