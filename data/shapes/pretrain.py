"""
Makes the shapes world's "pretrained" models from scratch. What it made is committed, but for models/sd3, so
nobody has to run it.

    python data/shapes/pretrain.py           # three hours on two cores

writes, each an ordinary save_pretrained folder,

    models/sd         a Stable Diffusion: VAE, CLIP text encoder and UNet, trained to draw what a text says
    models/sd3        a Stable Diffusion 3 on the same VAE: two CLIPs and a rectified-flow transformer
    models/florence   a Florence-2, trained on regions and on captioning as the real one was
    models/qwen       a Qwen2 that has read captions and never saw a picture

The drawing model reads two kinds of text, as the real one's alt-texts range from vague to exact: the world's
captions, and the same with map references ("a small blue circle at k f size c"). The other two know captions
only. A finished part is skipped: delete its folder to make it again.
"""

import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from prepare import COLORS, MAP, RESOLUTION, SHAPES, SIZES
from prepare import coverage, describe, describe_precisely, draw, scenes, validation_captions
from tqdm import tqdm
from transformers import BartTokenizer, CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, Florence2Config
from transformers import Florence2ForConditionalGeneration, Florence2Processor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from data.settings import Count, NonNegative, read_settings

CONTEXT = 40  # CLIP positions: the longest text has 37 tokens


def fit(name, modules, loss_of, steps, lr, batch_size, count, precision=torch.float32):
    """AdamW with a short warm-up and a cosine to zero. loss_of: indices of scenes -> their loss."""
    params = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.01)
    shape = lambda step: min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    for m in modules:
        m.train()
    bar, mean = tqdm(range(steps), desc=name, mininterval=5), None
    print(f"{name}: {sum(p.numel() for p in params):,} parameters", flush=True)
    for step in bar:
        indices = torch.randint(count, (batch_size,))
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            loss = loss_of(indices)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{mean:.4f}")
    for m in modules:
        m.eval().requires_grad_(False)
    return mean


def train_vae(images, steps):
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64], layers_per_block=1, latent_channels=4, norm_num_groups=8,
        sample_size=RESOLUTION)

    def loss_of(indices):
        x = images[indices].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample.float() - x
        return error.abs().mean() + error.square().mean() + 1e-6 * posterior.kl().mean()

    fit("vae", [vae], loss_of, steps, lr=1e-3, batch_size=64, count=len(images), precision=torch.bfloat16)
    return (vae,)


@torch.no_grad()
def encode_images(vae, images):
    """Means and standard deviations of all latents, (n, 4, 8, 8) each."""
    chunks = tqdm(images.split(256), desc="latents")
    parts = [vae.encode(chunk.float() / 127.5 - 1).latent_dist for chunk in chunks]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def to_ids(tokenizer, texts, precise_texts):
    """Token ids of the texts, of the precise texts and of the empty one, (n or 1, CONTEXT) each."""
    ids = [tokenizer(t, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
           for t in (texts, precise_texts, [""])]
    assert ids[0].shape[1] == ids[1].shape[1] == CONTEXT, "a text is longer than CLIP's positions"
    return ids


def choose_prompts(ids, indices):
    """One text of each scene, of either kind; 10 % are empty, for classifier-free guidance."""
    kind = torch.rand(len(indices), 1)
    return torch.where(kind < 0.45, ids[0][indices], torch.where(kind < 0.9, ids[1][indices], ids[2]))


def make_clip(cls, tokenizer, width, **kwargs):
    clip = cls(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3,
        num_attention_heads=width // 32, max_position_embeddings=CONTEXT, hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, **kwargs))
    # At this width CLIP's 0.02 would drown a word and its place in the average of the words around it.
    embeddings = clip.get_submodule("text_model.embeddings" if hasattr(clip, "text_model") else "embeddings")
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    return clip


def train_sd(vae_path, images, texts, precise_texts, steps):
    vae = AutoencoderKL.from_pretrained(vae_path)
    mean, std = encode_images(vae, images)
    vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
    tokenizer = CLIPTokenizer().train_new_from_iterator(
        texts[:5000] + precise_texts[:5000] + [" ".join(MAP)] * 100, vocab_size=1000, show_progress=False)
    tokenizer.model_max_length = CONTEXT
    text_encoder = make_clip(CLIPTextModel, tokenizer, 128)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4, in_channels=4, out_channels=4,
        down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2, block_out_channels=[64, 96, 96],
        layers_per_block=1, cross_attention_dim=128, attention_head_dim=[2, 3, 3], norm_num_groups=16,
        use_linear_projection=True)
    # v-prediction, as in the 768-pixel Stable Diffusion 2.1, weighs the noisy timesteps, where it is decided
    # what goes where. After 3,600 steps of ε-prediction colours and shapes were right, places still ignored.
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              steps_offset=1, clip_sample=False, set_alpha_to_one=False,
                              prediction_type="v_prediction")
    ids = to_ids(tokenizer, texts, precise_texts)

    def loss_of(indices):
        latents = (mean[indices] + std[indices] * torch.randn_like(mean[indices])) * vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (len(indices),))
        prompts = choose_prompts(ids, indices)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.get_velocity(latents, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, text_encoder(prompts).last_hidden_state).sample, velocity)

    fit("sd", [text_encoder, unet], loss_of, steps, lr=1e-3, batch_size=64, count=len(images))
    return (StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                                    scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                    requires_safety_checker=False),)


def train_sd3(sd_path, images, texts, precise_texts, steps):
    vae = AutoencoderKL.from_pretrained(sd_path / "vae")
    mean, std = encode_images(vae, images)
    vae.register_to_config(shift_factor=round(mean.mean().item(), 5))
    tokenizer = CLIPTokenizer.from_pretrained(sd_path / "tokenizer")
    clips = [make_clip(CLIPTextModelWithProjection, tokenizer, 64, projection_dim=64) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=RESOLUTION // 4, patch_size=1, in_channels=4, out_channels=4, num_layers=6,
        num_attention_heads=4, attention_head_dim=32, joint_attention_dim=128, caption_projection_dim=128,
        pooled_projection_dim=128, pos_embed_max_size=RESOLUTION // 4, qk_norm="rms_norm")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    ids = to_ids(tokenizer, texts, precise_texts)

    def loss_of(indices):
        latents = mean[indices] + std[indices] * torch.randn_like(mean[indices])
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        noise, prompts = torch.randn_like(latents), choose_prompts(ids, indices)
        times = (1000 * torch.randn(len(indices)).sigmoid()).long()  # logit-normal (Esser et al. 2024, 3.1)
        sigmas = scheduler.sigmas[times].view(-1, 1, 1, 1)
        outputs = [clip(prompts, output_hidden_states=True) for clip in clips]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        noisy, timesteps = (1 - sigmas) * latents + sigmas * noise, scheduler.timesteps[times]
        velocity = transformer(noisy, hidden, pooled, timesteps).sample
        return F.mse_loss(velocity, noise - latents)

    fit("sd3", [*clips, transformer], loss_of, steps, lr=1e-3, batch_size=64, count=len(images))
    return (StableDiffusion3Pipeline(
        vae=vae, text_encoder=clips[0], tokenizer=tokenizer, text_encoder_2=clips[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None, transformer=transformer, scheduler=scheduler),)


def train_qwen(texts, steps, width=128, layers=4):
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts[:5000], vocab_size=500, show_progress=False)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    texts = [text + tokenizer.eos_token for text in texts]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    def loss_of(indices):
        ids, mask = batch.input_ids[indices], batch.attention_mask[indices]
        return model(ids, attention_mask=mask, labels=labels[indices]).loss

    fit("qwen", [model], loss_of, steps, lr=2e-3, batch_size=32, count=len(texts))
    return model, tokenizer


def region_labels(scene, patch=4):
    """(3, 8, 8) int: shape, colour and size, from 1, of what covers over a quarter of a patch; 0: nothing."""
    labels = np.zeros((3, RESOLUTION // patch, RESOLUTION // patch), dtype=np.int64)
    for o in scene["objects"]:
        cover = coverage(o["shape"], o["x"], o["y"], o["r"])
        here = cover.reshape(RESOLUTION // patch, patch, RESOLUTION // patch, patch).mean((1, 3)) > 0.25
        for row, (name, values) in enumerate([("shape", SHAPES), ("color", COLORS), ("size", SIZES)]):
            labels[row][here] = list(values).index(o[name]) + 1
    return labels


def train_florence(images, texts, drawn, region_steps, steps):
    tokenizer = BartTokenizer(extra_special_tokens={"image_token": "<image>"})
    task = "Describe with a paragraph what is shown in the image."
    read = texts[:5000] + [task] * 100
    tokenizer = tokenizer.train_new_from_iterator(read, vocab_size=500, show_progress=False)
    tokens, size = (RESOLUTION // 4) ** 2 + 1, {"height": RESOLUTION, "width": RESOLUTION}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=mean,
                                            image_std=std)
    image_processor.image_seq_length = tokens
    processor = Florence2Processor(image_processor=image_processor, tokenizer=tokenizer)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
               eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.eos_token_id)
    # The usual 0.02 is made for widths of 1,000: at 128 attention starts out blind, and after 1,500 steps
    # only the background had been learned. Positions must be as large as the contents that they are added to.
    model = Florence2ForConditionalGeneration(Florence2Config(
        initializer_range=0.09, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=dict(
            embed_dim=[64, 64, 96, 128], depths=[1, 1, 1, 1], num_heads=[2, 2, 3, 4], num_groups=[2, 2, 3, 4],
            patch_stride=[4, 1, 1, 1], window_size=8, projection_dim=128,
            drop_path_rate=0.0, initializer_range=0.09),
        text_config=dict(
            model_type="bart", vocab_size=len(tokenizer), d_model=128, encoder_layers=2, decoder_layers=3,
            encoder_ffn_dim=512, decoder_ffn_dim=512, encoder_attention_heads=4, decoder_attention_heads=4,
            max_position_embeddings=256, init_std=0.09, dropout=0.0, scale_embedding=False, **ids),
        **ids))
    places, bart = model.model.multi_modal_projector.image_position_embed, model.model.language_model
    for embedding, size in [(places.row_embeddings, 1.0), (places.column_embeddings, 1.0),
                            (bart.encoder.embed_positions, 0.5), (bart.decoder.embed_positions, 0.5)]:
        torch.nn.init.normal_(embedding.weight, std=size)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    image_ids = tokenizer("<image>" * tokens, add_special_tokens=False).input_ids
    prompt = torch.tensor([image_ids + tokenizer(task).input_ids])
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)

    # Captions alone teach the tower colours and places, but after 1,200 steps circles and squares were still
    # one to it; and what the frozen tower cannot see, VLV cannot learn. The real one was pretrained on
    # regions, too.
    regions = torch.from_numpy(np.stack([region_labels(scene) for scene in drawn]))
    kinds = [len(SHAPES) + 1, len(COLORS) + 1, len(SIZES) + 1]
    tower, head = model.model.vision_tower, torch.nn.Linear(128, sum(kinds))

    def region_loss(indices):
        features = tower((images[indices].float() / 255 - mean) / std).last_hidden_state  # (B, 128, 8, 8)
        scores = head(features.movedim(1, -1)).movedim(-1, 1).split(kinds, 1)
        return sum(F.cross_entropy(score, regions[indices, row]) for row, score in enumerate(scores))

    fit("its tower", [tower, head], region_loss, region_steps, lr=1e-3, batch_size=64, count=len(texts))
    model.requires_grad_(True)

    def loss_of(indices):
        pixel_values = (images[indices].float() / 255 - mean) / std
        prompts = prompt.expand(len(indices), -1)
        return model(input_ids=prompts, pixel_values=pixel_values, labels=labels[indices]).loss

    fit("florence", [model], loss_of, steps, lr=5e-4, batch_size=32, count=len(texts))
    return model, processor


def save(path, *parts):
    """Half precision, written beside and renamed: a folder is complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in parts:
        if hasattr(part, "to"):
            part.to(dtype=torch.float16)
        for name, module in getattr(part, "components", {}).items():
            if name.startswith("text_encoder") and module:  # a pipeline loads CLIP as it was saved
                module.float()
        part.save_pretrained(temporary)
    for file in temporary.rglob("config.json"):  # diffusers notes where the VAE was; that place is no more
        values = json.loads(file.read_text())
        if values.pop("_name_or_path", None):
            file.write_text(json.dumps(values, indent=2) + "\n")
    temporary.rename(path)
    print(f"{path}: {sum(f.stat().st_size for f in path.rglob('*') if f.is_file()) / 1e6:.1f} MB", flush=True)


@dataclass
class PretrainConfig:
    out: Path = HERE / "models"
    scenes: Count = 60_000
    vae_steps: Count = 5000
    sd_steps: Count = 8000
    sd3_steps: Count = 8000
    qwen_steps: Count = 800
    region_steps: Count = 4000
    florence_steps: Count = 2000
    seed: NonNegative = 1


def main(argv=None):
    args = read_settings(PretrainConfig, argv, __doc__)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    drawn = scenes("pretrain", args.scenes, args.seed, exclude=validation_captions())
    drawn = list(tqdm(drawn, total=args.scenes, desc="scenes", mininterval=5))
    images = torch.from_numpy(np.stack([np.array(draw(s)) for s in tqdm(drawn, desc="draw", mininterval=5)]))
    images = images.permute(0, 3, 1, 2).contiguous()  # (n, 3, 32, 32) uint8
    texts, precise_texts = [describe(s) for s in drawn], [describe_precisely(s) for s in drawn]
    vae_path, sd_path = args.out / "vae", args.out / "sd"

    def make(path, train, *arguments):
        if not path.exists() and not (path == vae_path and sd_path.exists()):
            torch.manual_seed(args.seed)  # so that a part is the same whichever others are skipped
            save(path, *train(*arguments))

    make(args.out / "qwen", train_qwen, texts, args.qwen_steps)
    make(args.out / "florence", train_florence, images, texts, drawn, args.region_steps, args.florence_steps)
    make(vae_path, train_vae, images, args.vae_steps)
    make(sd_path, train_sd, vae_path, images, texts, precise_texts, args.sd_steps)
    shutil.rmtree(vae_path, ignore_errors=True)  # it lives in sd/vae now
    make(args.out / "sd3", train_sd3, sd_path, images, texts, precise_texts, args.sd3_steps)


if __name__ == "__main__":
    main()
