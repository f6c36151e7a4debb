"""
Loads models: pretrained ones, and the parts that a checkpoint brings. Each weight is read once, in the precision in which it
will run; a part that a checkpoint holds is built without weights (on torch's meta device) and given those.
"""

from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import torch.nn as nn
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, CLIPTextConfig, CLIPTextModel
from transformers.models.florence2.modeling_florence2 import (
    Florence2MultiModalProjector, Florence2PreTrainedModel, Florence2VisionBackbone,
)  # fmt: skip

from data.checkpoint import open_tensors

REPOSITORY = Path(__file__).parent.parent
LARGE = 500e6  # bytes of a checkpoint, from which on CPUs are faster in bf16


@contextmanager
def no_loading_bars():
    """The libraries draw bars for what loads in a moment; whoever uses this one may have them drawn elsewhere."""
    libraries = [lib.utils.logging for lib in (diffusers, transformers) if lib.utils.logging.is_progress_bar_enabled()]
    for logging in libraries:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in libraries:
            logging.enable_progress_bar()


@contextmanager
def default_dtype(dtype: torch.dtype):
    """New floating-point weights are of this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@no_loading_bars()
def load(cls, name: str, role: str, random_init: bool = False, dtype: torch.dtype = torch.float32, **kwargs):
    """cls.from_pretrained of a local folder or of a hub id that was downloaded (it does not download: eight processes
    would, and whoever is offline would wait). random_init: cls with new weights, from the configuration in the local
    folder or in data/configs. Raises OSError with one sentence."""
    places = [Path(name), REPOSITORY / name] + [REPOSITORY / "data" / "configs" / Path(name).name] * random_init
    place = next((p for p in places if p.is_dir()), name)
    try:
        if cls is StableDiffusionPipeline:
            if random_init:
                with default_dtype(dtype):
                    for part, kind in [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)]:
                        if part not in kwargs:
                            kwargs[part] = kind.from_config(kind.load_config(place, subfolder=part, local_files_only=True))
                    clip_config = CLIPTextConfig.from_pretrained(place, subfolder="text_encoder", local_files_only=True)
                    kwargs["text_encoder"] = CLIPTextModel(clip_config)
            return cls.from_pretrained(place, dtype=dtype, local_files_only=True, low_cpu_mem_usage=False, **kwargs)
        if issubclass(cls, (AutoConfig, AutoTokenizer, AutoImageProcessor)):
            return cls.from_pretrained(place, local_files_only=True)
        if random_init:
            with default_dtype(dtype):
                config = AutoConfig.from_pretrained(place, local_files_only=True)
                return cls.from_config(config, dtype=dtype) if hasattr(cls, "from_config") else cls(config)
        model, report = cls.from_pretrained(place, local_files_only=True, dtype=dtype, output_loading_info=True)
        if report["missing_keys"]:  # transformers would make them up
            raise OSError(f"it has no weight {min(report['missing_keys'])}")
        return model
    except Exception as error:
        what = f"its configuration is not in {places[-1]}" if random_init else f"download it with: hf download {name}"
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"cannot load the {role} {name!r}: it is no local folder with such a model, and not among the downloaded"
            f" ones; {what} ({type(error).__name__}: {reason})"
        ) from error


class FlorenceVision(Florence2PreTrainedModel):
    """Of Florence-2 what no checkpoint brings: the vision tower and its projector."""

    _keys_to_ignore_on_load_unexpected = ["language_model", "lm_head"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = Florence2VisionBackbone(config.vision_config)
        self.multi_modal_projector = Florence2MultiModalProjector(config)
        self.post_init()


class FlorenceVisionAndWords(FlorenceVision):
    """And the token table, to embed a prompt that the checkpoint does not hold embedded."""

    def __init__(self, config):
        super().__init__(config)
        self.language_model = nn.Module()
        self.language_model.shared = nn.Embedding(config.text_config.vocab_size, config.text_config.d_model)


def choose_dtype(precision: str, device: torch.device, folder: Path) -> torch.dtype:
    """What the weights of a model that only runs are stored in and computed with. precision: fp32, bf16, fp16 or auto."""
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    is_large = sum(file.stat().st_size for file in folder.glob("model*.safetensors")) > LARGE
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else is_large
    return torch.bfloat16 if bf16 else torch.float32


FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors


class Weights:
    """The learned weights of a checkpoint folder, each of which is read when it is taken, and taken once; none where a model
    starts from the pretrained ones (folder None). used_as: the type in which they will be used as they lie in the file, if that
    is their type: then they are mapped, which is three times faster. None: they will change, or move."""

    def __init__(self, folder: Path | None = None, used_as: torch.dtype | None = None):
        self.folder, self.left = folder, {}
        for mapped in (True, False) if folder else ():
            self.left = {name: file.get_slice(name) for file in open_tensors(folder, "model", mapped) for name in file.keys()}
            if mapped and {weight.get_dtype() for weight in self.left.values()} == {FORMATS.get(used_as)}:
                break

    def hold(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.left)

    def take(self, name: str, shape=None):
        """What reads the weight, by [...]. Raises ValueError when it is missing or misshapen."""
        weight = self.left.pop(name, None)
        if weight is None:
            raise self.problem(f"{name} is missing")
        here = tuple(weight.shape if isinstance(weight, torch.Tensor) else weight.get_shape())
        if shape is not None and here != tuple(shape):
            raise self.problem(f"{name} is {here}, but should be {tuple(shape)}")
        return weight

    def problem(self, sentence: str) -> ValueError:
        return ValueError(f"the checkpoint {self.folder} does not fit its config.json and models: {sentence}")

    def take_all(self, module: nn.Module, prefix: str) -> dict:
        """Of a module on the meta device; tied weights, such as an LLM's embeddings and head, are there once."""
        once = {name for name, _ in module.named_parameters()}
        tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - once
        return {name: self.take(prefix + name, w.shape) for name, w in module.state_dict().items() if name not in tied}

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        """Gives a module that was built on the meta device its weights."""
        state = {name: weight[...].to(dtype) for name, weight in self.take_all(module, prefix).items()}
        module.load_state_dict(state, assign=True)

    @no_loading_bars()
    def language_model(self, config, prefix: str, dtype: torch.dtype) -> nn.Module:
        """A causal LM of transformers, which looks after its buffers and tied weights."""
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return type(empty).from_pretrained(None, config=config, state_dict=self.take_all(empty, prefix), dtype=dtype)
