"""Train the demo model: a small Llama on the sources of the Python standard library.

    python tools/train_demo_model.py --minutes 110

Writes model.safetensors (bf16, the state with the lowest held-out loss), config.json, tokenizer.json and
training_log.jsonl to --out. A run that is stopped continues from its checkpoint when the same command is given again.
The learning rate follows the share of the time budget that is used, so a longer --minutes on the same checkpoint simply
trains on.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "aaac_ao" / "demo"))
import corpus

log = logging.getLogger("train_demo_model")
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training modules."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.training_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def new_model(args: argparse.Namespace) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 32,
            num_key_value_heads=args.hidden // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only, as is usual for transformers."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2 % of the budget, then a cosine down to 2 % of the peak."""
    if progress < 0.02:
        return peak * progress / 0.02 + 1e-6
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))
    return peak * (0.02 + 0.98 * cosine)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    with torch.autocast("cpu" if ids.device.type == "cpu" else "cuda", dtype=torch.bfloat16, enabled=bf16):
        logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, held_out: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean loss in nats per token over evenly spaced held-out windows."""
    windows = held_out[: held_out.numel() // args.context * args.context].view(-1, args.context)
    windows = windows[:: max(1, len(windows) // 32)][:32]
    model.eval()
    losses = [loss_of(model, part, args.bf16).item() for part in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    copy.deepcopy(model).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer(args.vocab_size)
        tokenizer.save_pretrained(args.out)
    data = corpus.token_stream(tokenizer, corpus.training_texts()).to(device)
    held_out = corpus.token_stream(tokenizer, corpus.held_out_texts()).to(device)
    model = new_model(args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), betas=(0.9, 0.95), lr=args.lr)
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "best": math.inf}
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state |= saved["state"]
        forget_later_rows(args.out / "training_log.jsonl", state["step"])
        log.info("continuing at step %d, %.1f minutes", state["step"], state["seconds"] / 60)
    counts = torch.bincount(data, minlength=args.vocab_size).double() + 1
    unigram = -(counts / counts.sum()).log()[held_out].mean().item()
    parameters = sum(p.numel() for p in model.parameters())
    log.info("%d parameters, %d training tokens, unigram loss %.3f", parameters, data.numel(), unigram)
    generator = torch.Generator().manual_seed(args.seed + 1 + state["step"])
    budget = args.minutes * 60
    last_report, last_save = state["seconds"], state["seconds"]
    with open(args.out / "training_log.jsonl", "a") as journal:
        if state["step"] == 0:
            header = {"parameters": parameters, "training_tokens": data.numel(), "unigram_loss": round(unigram, 4)}
            journal.write(json.dumps(header) + "\n")
        while state["seconds"] < budget:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state["seconds"] / budget, args.lr)
            starts = torch.randint(data.numel() - args.context - 1, (args.batch,), generator=generator)
            ids = torch.stack([data[s : s + args.context + 1] for s in starts.tolist()])
            loss = loss_of(model, ids, args.bf16)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state["step"] += 1
            state["tokens"] += args.batch * args.context
            state["seconds"] += time.perf_counter() - began
            done = state["seconds"] >= budget
            if done or state["seconds"] - last_report > args.report_seconds:
                last_report = state["seconds"]
                row = {key: round(state[key]) for key in ("step", "tokens", "seconds")}
                row["loss"] = round(loss.item(), 4)
                row["held_out_loss"] = round(held_out_loss(model, held_out, args), 4)
                if row["held_out_loss"] < state["best"]:
                    state["best"] = row["best"] = row["held_out_loss"]
                    save(model, tokenizer, args.out)
                journal.write(json.dumps(row) + "\n")
                journal.flush()
                log.info("%s", row)
            if done or state["seconds"] - last_save > 300:
                last_save = state["seconds"]
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
                torch.save(saved, args.checkpoint)


def forget_later_rows(journal: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a run continues from."""
    rows = [row for row in journal.read_text().splitlines() if json.loads(row).get("step", 0) <= step]
    journal.write_text("".join(row + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--out", type=Path, default=here / "aaac_ao" / "demo" / "model")
    parser.add_argument("--checkpoint", type=Path, default=here / "build" / "demo_model.pt")
    parser.add_argument("--minutes", type=float, default=110, help="time budget, resumed time included")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--report-seconds", type=float, default=120)
    args = parser.parse_args()
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(args)


if __name__ == "__main__":
    main()
