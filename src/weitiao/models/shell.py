"""A model without its weights: chat format, configuration and fingerprint, for those who have it computed elsewhere."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..errors import ModelError
from .families import family_of
from .opening import OpenModel, open_renderer
from .sources import fingerprint, first_line, model_folder


def open_shell(path: str) -> OpenModel:
    """The model `path` as `opening.open_model` opens it, but with weights that hold no numbers (device ``meta``).

    Raises:
        ModelError: the folder is incomplete, needs code of its own, or is in a layout of the GLM originals, which other
            engines read only by running the checkpoint's own code.
    """
    folder = model_folder(path)
    family = family_of(folder)
    if family.layout is not None:
        raise ModelError(
            f"{family.models.partition(',')[0]} in {folder} lies as its makers published it. vLLM does not know it, or "
            f"would run the checkpoint's own Python files, which weitiao never does. Serve it without --engine vllm."
        )
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except Exception as error:  # noqa: BLE001 - unknown architectures and broken files raise all kinds of types
        raise ModelError(f"The model in {folder} cannot be opened ({first_line(error)}).") from None
    assert isinstance(model, PreTrainedModel)
    return OpenModel(
        model=model.eval(), family=family, folder=folder, fingerprint=fingerprint(folder), text=open_renderer(path)
    )
