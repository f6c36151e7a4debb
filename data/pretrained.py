"""
Loads models: pretrained ones, and the parts that a checkpoint brings. Each weight is read once, in the precision in which it
will run; a part that a checkpoint holds is built without weights (on torch's meta device) and given those.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import diffusers
import torch
import torch.nn as nn
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import CLIPTextConfig, CLIPTextModel, Florence2Model
from transformers.models.florence2.modeling_florence2 import (
    Florence2MultiModalProjector, Florence2PreTrainedModel, Florence2VisionBackbone,
)  # fmt: skip

from data.checkpoint import open_tensors

REPOSITORY = Path(__file__).parent.parent
PREFIXES = {  # what the names of a learned part's weights begin with
    "bart": "encoder.bart.", "queries": "encoder.queries.", "projection": "encoder.projection.",
    "mlp": "caption_head.mlp.", "llm": "caption_head.llm.",
}  # fmt: skip
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


def load_pipeline(name: str, with_unet: bool, random_init: bool, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A text-to-image model, without VAE and UNet where only its text encoder is needed."""
    parts = {} if with_unet else {"vae": None, "unet": None}
    pipeline = load(StableDiffusionPipeline, name, "text-to-image model (--diffusion_model)", random_init, dtype,
                    safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    starts from the pretrained ones (folder None). What will be used as it lies in the file, in this dtype, is mapped, which is three
    times faster."""

    def __init__(self, folder: Path | None = None, dtype=torch.float32, for_training: bool = False, device=None):
        self.folder, self.left = folder, {}
        used_as = dtype
        if for_training:  # what trains on the CPU must not lie in a file that the run will remove
            used_as = torch.float32 if torch.device(device or "cpu").type == "cuda" else None
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
        """Gives a module, which may be on the meta device, the weights that the checkpoint holds of it, and this precision."""
        if self.hold(prefix):
            state = {name: weight[...].to(dtype) for name, weight in self.take_all(module, prefix).items()}
            module.load_state_dict(state, assign=True)
        else:
            module.to(dtype)

    def check_fit(self, config, saved) -> None:
        """Raises ValueError where a model of `config` would miss something in this checkpoint, whose own configuration is `saved`."""
        if (self.folder / "llm").is_dir() and config.llm != saved.llm and config.stage == 2:
            raise ValueError(f"the checkpoint {self.folder} brings its own language model, {saved.llm}: leave --llm {config.llm} out")
        for part in saved.learned:
            if not self.hold(PREFIXES[part]):
                raise self.problem(f"{PREFIXES[part]}* is missing")
        if config.prompt != saved.prompt:
            self.left.pop("encoder.prompt_embeds", None)

    def check_used(self) -> None:
        """Raises ValueError where a weight was taken by nobody."""
        if self.left:
            raise self.problem(f"{min(self.left)} belongs to no part")


def load_florence(config, weights: Weights, dtype: torch.dtype, frozen_dtype: torch.dtype) -> tuple:
    """Of Florence-2 what a VLV needs: (model with vision_tower, multi_modal_projector and config; BART, with encoder and decoder, on
    the meta device where the checkpoint brings it; the prompt's embeddings, (1, T, width); the image processor)."""
    here = partial(load, name=config.encoder, random_init=config.random_init)
    held, knows_prompt = weights.hold(PREFIXES["bart"]), weights.hold("encoder.prompt_embeds")
    kind = Florence2Model
    if held:
        kind = FlorenceVision if knows_prompt else FlorenceVisionAndWords
    florence = here(kind, role="vision encoder (--encoder)", dtype=frozen_dtype if held else dtype)
    # The prompt is constant, so its embeddings are too, and BART's token table (52 M weights) can go.
    if knows_prompt:
        prompt_embeds = weights.take("encoder.prompt_embeds")[...]
    else:
        ids = here(AutoTokenizer, role="vision encoder's tokenizer (--encoder)")(config.prompt).input_ids
        prompt_embeds = florence.language_model.shared(torch.tensor([ids])).detach()
    if held:
        with torch.device("meta"):
            bart = AutoModel.from_config(florence.config.text_config)
    else:
        bart = florence.language_model
    bart.encoder.embed_tokens = bart.decoder.embed_tokens = None
    processor = here(AutoImageProcessor, role="vision encoder's image processor (--encoder)")
    return florence, bart, prompt_embeds.to(dtype), processor


@no_loading_bars()
def load_language_model(config, weights: Weights, dtype: torch.dtype) -> tuple:
    """(causal LM, tokenizer): the checkpoint's, where it brings them."""
    held = weights.hold(PREFIXES["llm"])
    brings = held and (weights.folder / "llm").is_dir()  # its configuration and tokenizer, too
    here = partial(load, name=str(weights.folder / "llm") if brings else config.llm,
                   random_init=config.random_init and not brings)  # fmt: skip
    tokenizer = here(AutoTokenizer, role="language model's tokenizer (--llm)")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {config.llm} has no end-of-text token, so its captions could not end")
    if not held:
        return here(AutoModelForCausalLM, role="language model (--llm)", dtype=dtype), tokenizer
    llm_config = here(AutoConfig, role="language model's configuration (--llm)")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(llm_config, dtype=dtype)
    state = weights.take_all(empty, PREFIXES["llm"])
    # transformers looks after its buffers and tied weights
    return type(empty).from_pretrained(None, config=llm_config, state_dict=state, dtype=dtype), tokenizer
