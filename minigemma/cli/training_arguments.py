"""The flags of the commands that train."""

import argparse
from pathlib import Path

from .values import amount, names, number, share, unicode


def add_training(to: argparse.ArgumentParser) -> None:
    """What is trained, on what, for how long and how; defaults are those of `Settings` (train/settings.py)."""
    named = "a tiny model, or a config.json with its tokenizer beside it"
    to.add_argument("-m", "--model", dest="named", metavar="NAME|CONFIG.json", help=named)
    to.add_argument("--vocab", metavar="DIR", help="a folder with the tokenizer to use, in place of the model's own")
    to.add_argument("--init", metavar="MODEL", help="begin with this model's parameters, not with random ones")
    to.add_argument(
        "--qat", metavar="DTYPE", help="run with matrices rounded as --dtype would: int4, int4-row, sfp8, …"
    )
    add_run(to)


def add_run(
    to: argparse.ArgumentParser, seq: int = 256, batch: int = 2048, lr: float = 0.002, decay: float = 0.1
) -> None:
    """The data, length and settings of a run; the numbers are defaults, to be shown."""
    to.add_argument("--data", nargs="+", metavar="FILE", help='text, or jsonl of {"text": …}; .gz and .xz ones too')
    to.add_argument("--out", metavar="DIR", help="the folder of the run, which must not be there yet")
    to.add_argument("--resume", action="store_true", help="go on with the run in --out")
    to.add_argument("--steps", type=amount, metavar="N", help="the length of the training")
    to.add_argument("--tokens", type=amount, metavar="N", help="… in tokens, such as 10M")
    to.add_argument("--stop-after", type=number(int, 1), metavar="N", help="save and stop after N of the steps")
    to.add_argument("--seed", type=int, metavar="N", help="of the first parameters and the order of the data (0)")
    to.add_argument("--seq", type=amount, metavar="N", help=f"tokens that are seen together ({seq})")
    to.add_argument("--batch-tokens", type=amount, metavar="N", help=f"tokens of a step ({batch})")
    to.add_argument("--micro-tokens", type=amount, metavar="N", help="… of which at once: bounds the memory")
    to.add_argument("--lr", type=float, metavar="X", help=f"highest learning rate ({lr:g})")
    to.add_argument("--warmup", type=share, metavar="X%", help="part of the training in which it rises (5%%)")
    to.add_argument("--min-lr", type=share, metavar="X%", help="how much of it is left at the end (10%%)")
    to.add_argument("--weight-decay", type=float, metavar="X", help=f"of matrices ({decay:g})")
    to.add_argument("--clip", type=float, metavar="X", help="largest norm of the gradient (1.0)")
    to.add_argument("--held-out", type=share, metavar="X%", help="the end of the data, kept to measure on (5%%)")
    to.add_argument("--eval-every", type=amount, metavar="N", help="steps between measurements (100)")
    to.add_argument("--save-every", type=amount, metavar="N", help="steps between checkpoints (500)")
    to.add_argument("--sample-every", type=amount, metavar="N", help="steps between texts that it writes (none)")
    to.add_argument("--prompt", type=unicode, metavar="TEXT", help="what these begin with")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves when it stops")
    to.add_argument("-t", "--threads", type=number(int, 1), metavar="N", help="(default: all cores)")


def add_teacher(to: argparse.ArgumentParser) -> None:
    """Adds the flags of distillation: the teacher and what is stored of its answers (train/targets.py)."""
    to.add_argument("--teacher", metavar="MODEL", help="folder, file, name or Hugging Face id of the larger model")
    to.add_argument("--targets", metavar="DIR", help="where its answers are kept, once for all students (OUT/targets)")
    kept = "256 draws of each distribution (default), set:256, top:64, or all of it, computed in every step"
    to.add_argument("--draws", metavar="N|all|…", help=kept)
    to.add_argument("--soft", type=share, metavar="X%", help="its share; the rest is the text's next token (100%%)")
    to.add_argument("--on-policy", type=share, metavar="X%", help="share of windows that the student writes on (0%%)")
    beta = "the divergence: 0 forward KL, 1 reverse KL, between them JSD(beta)"
    to.add_argument("--beta", type=number(float, 0, 1), metavar="X", help=beta)


def add_finetuning(to: argparse.ArgumentParser) -> None:
    """Which model is changed, and how (train/finetune.py)."""
    to.add_argument("-m", "--model", dest="named", metavar="MODEL", help="folder, file, name or Hugging Face id")
    to.add_argument("--rank", type=number(int, 1, 1024), metavar="N", help="of the adapter (8)")
    to.add_argument("--alpha", type=float, metavar="X", help="its scale is alpha / rank (16)")
    modules = "q_proj,v_proj, … as peft names them (default: all linear maps of the layers)"
    to.add_argument("--target-modules", dest="modules", type=names, metavar="NAME,…", help=modules)
    to.add_argument("--full", action="store_true", help="train every parameter in float32, without an adapter")
    to.add_argument("--merge", metavar="OUT", help="at the end, write the changed model as `export` does")
    to.add_argument("--dtype", metavar="DTYPE", help="hold the frozen weights so (default: as stored)")
    add_run(to, 512, 512, 0.0002, 0.0)
