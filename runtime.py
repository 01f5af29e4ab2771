"""What every script does besides its algorithm: processes, files, run folder and command line.

No line of an algorithm is in this file. common.py and the scripts build on it.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """A mistake of the user. `run_main` prints it as one line and exits with code 2."""


def require(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """Return the first line of a message, or two if the first announces the second."""
    first, *rest = str(error).strip().split("\n")
    return f"{first} {rest[0].strip()}" if rest and first.rstrip().endswith(":") else first


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the device ran out. PyTorch and CUDA report it in many ways."""
    messages = ("t allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in messages)


@functools.cache
def warn(text: str) -> None:
    """Print a warning to standard error, once."""
    if process_rank() == 0:
        tqdm.write(f"warning: {text}", file=sys.stderr)


# ---- 1. Several processes: `torchrun --nproc-per-node N script.py ...` ---------------------------
# Every process runs the same script on the same data. Each takes its share of the problems to
# sample and of the sequences to train on. Only rank 0 writes and prints.


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes() -> None:
    """Join the process group if torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "LOCAL_RANK" not in os.environ:
        return
    # If torchrun is killed, end as well. Otherwise a second run would write to the same folder.
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Processes may wait hours for the slowest one.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        sys.stderr.isatty = lambda: False  # no progress bars


def torch_device(name: str) -> torch.device:
    """Return the device of a flag. "auto" is the GPU of this process if there is one."""
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1 or not name.startswith("cuda:")
    require(alone, f"--device {name}: several processes need a GPU each; leave it at auto")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({first_line(error)})") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)  # CUDA graphs are recorded on the current device
        # cuDNN's attention is slow here: it plans again for every new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def gather(part: list) -> list:
    """Return the lists of all processes, joined."""
    parts = [part] * process_count()
    if len(parts) > 1:
        dist.all_gather_object(parts, part)
    return list(itertools.chain(*parts))


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in at least one process."""
    total = torch.tensor(float(flag))
    if process_count() > 1:
        dist.all_reduce(total)
    return total.item() > 0


def on_first(action: Callable):
    """Run `action`, which uses files, on rank 0. All processes get its result or its error."""
    if process_count() == 1:
        return action()
    outcome = [None, None]
    if process_rank() == 0:
        try:
            outcome = [action(), None]
        except (UserError, OSError) as error:
            outcome = [None, str(error)]
    dist.broadcast_object_list(outcome, 0)
    require(outcome[1] is None, outcome[1])
    return outcome[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter], *sums: float) -> list[float]:
    """Add up the gradients of all processes, and the numbers in `sums`, as one flat tensor."""
    if process_count() == 1:
        return list(sums)
    parameters = [p for p in parameters if p.requires_grad]
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    numbers = [*map(float, sums), *(float(p.grad is not None) for p in parameters)]
    flat.append(torch.tensor(numbers, device=flat[0].device))
    total = torch.cat(flat)
    dist.all_reduce(total)
    *gradients, numbers = total.split([len(part) for part in flat])
    numbers = numbers.tolist()
    # A parameter without any gradient keeps None. With zeros the moments of AdamW would move it.
    for p, gradient, has in zip(parameters, gradients, numbers[len(sums) :], strict=True):
        p.grad = gradient.view_as(p) if has else None
    return numbers[: len(sums)]


# ---- 2. Files and model folders ------------------------------------------------------------------

TINY = Path(__file__).parent / "tiny"


@contextlib.contextmanager
def atomic_write(path: Path):
    """Open a temporary file and rename it to `path` when it is complete. Only rank 0 writes."""
    if process_rank() > 0:
        yield io.BytesIO()
        return
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Delete a folder and all that is in it, or a symbolic link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(folder: Path, new: Path) -> None:
    """Rename `new` to `folder`. Killed in between, `Run` finds the old one under its name.old."""
    old = folder.with_name(folder.name + ".old")
    remove(old)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        folder.rename(old)
    new.rename(folder)
    remove(old)


_locks: dict[Path, int] = {}


def lock(path: Path, shown: Path | None = None) -> None:
    """Lock a folder or file until this process ends. Raises UserError if another one has it."""
    if fcntl is None or (key := path.resolve()) in _locks:
        return
    _locks[key] = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(_locks[key], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(_locks.pop(key))
        advice = "another process is writing to it; wait for it, or choose another --out"
        raise UserError(f"{shown or path}: {advice}") from None
    except OSError:  # a file system without locks
        pass


def append(path: Path, lines: str) -> None:
    if process_rank() == 0:
        with open(path, "a", encoding="utf-8") as file:
            file.write(lines)


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read an object that this project wrote. Raises UserError if it is missing or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: missing or broken ({error})") from None


def plain_number(text: str) -> str:
    """Write a number without its exponent, unless it has very many digits: "1e3" -> "1000"."""
    number = Decimal(text)
    return format(number, "f") if abs(number.adjusted()) < 64 else text


def read_rows(path: Path) -> list[tuple[str, object]]:
    """Read a JSON list, or one JSON object per line: [(position for errors, value)].

    Numbers with a point or an exponent become text. Raises UserError with file and line.
    """
    where, rows = str(path), []
    try:
        text = path.read_text(encoding="utf-8-sig")
        # `Dataset.to_json` of datasets writes lines to a file of any name.
        is_list = path.suffix == ".json" and not text.lstrip().startswith("{")
        entries = json.loads(text, parse_float=plain_number) if is_list else text.split("\n")
        require(isinstance(entries, list), f"{path}: not a list of problems")
        for i, entry in enumerate(entries, 1):
            where = f"{path} {'entry' if is_list else 'line'} {i}"
            if is_list or entry.strip():
                rows.append(
                    (where, entry if is_list else json.loads(entry, parse_float=plain_number))
                )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON ({error})") from None
    return rows


def model_folder(name: str, flag: str = "--model") -> str:
    """Return the folder or hub name of a model. "tiny" is the model in this repository."""
    path = TINY if name == "tiny" else Path(name)
    if path.is_dir():
        hint = f"; did you mean {path / 'model'}?" if (path / "model").is_dir() else ""
        is_model = (path / "config.json").is_file()
        require(is_model, f"{flag} {name}: the folder holds no model (no config.json){hint}")
        return str(path)
    default = re.fullmatch(r"runs/(sft|expert_iteration|reward_model|genrm)/model", name)
    hint = f"; run `python {default[1]}.py` first" if default else ""
    hint = hint.replace("genrm.py", "reward_model.py --kind genrm")
    on_hub = re.fullmatch(r"(?!tiny$|runs/)\w[\w.-]*(/[\w.-]+)?", name)
    require(on_hub, f"{flag} {name}: no such folder{hint}")
    return name


# Code that comes with a model folder is never run.
def load_config(folder: str):
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: str):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_weights(auto, folder: str, new: tuple = (), **how) -> torch.nn.Module:
    """Load a model in float32. Raises UserError if the folder lacks a weight.

    transformers would make it up at random. new: how the names begin that may be missing.
    """
    how |= dict(dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    how |= dict(ignore_mismatched_sizes=True, output_loading_info=True)
    # transformers would print a table. The lines below say the same.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, found = auto.from_pretrained(folder, **how)
    finally:
        transformers.logging.set_verbosity(verbosity)
    other = sorted(str(key[0]) for key in found["mismatched_keys"])
    require(not other, f"{len(other)} weights have another shape, for example {other[:1]}")
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(new))
    n, first = len(missing), missing[:1]
    require(not n, f"the folder lacks {n} weights of the model, for example {first}")
    unused = sorted(found["unexpected_keys"])
    if unused and not new:
        warn(f"{folder}: {len(unused)} weights are not used, for example {unused[:1]}")
    return model


def is_reward_model(config) -> bool:
    return any(name.endswith("ForTokenClassification") for name in config.architectures or ())


def checksum(files: list) -> str:
    """Return size and CRC-32 of the content of some files."""
    size, crc = 0, 0
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return f"{size}-{crc:08x}"


def fingerprint(name: str, flag: str = "--model") -> str:
    """Return a checksum of the weights in a model folder, or the name of a hub model."""
    files = sorted(Path(model_folder(name, flag)).glob("*.safetensors"))
    return checksum(files) if files else name


# ---- 3. The run folder ---------------------------------------------------------------------------


class Run:
    """The folder --out: args.json, metrics.jsonl, samples/, model/ and checkpoint/state.pt.

    If TensorBoard is installed, the numbers of metrics.jsonl are in tensorboard/ too.
    A run that was killed and is started again with --resume goes on from its last checkpoint, which
    is `state` or None. may_grow: the name of a setting that --resume may increase.
    """

    OUTPUTS = "checkpoint", "samples", "model", "model.old", "metrics.jsonl", "quality.json"

    def __init__(self, args: argparse.Namespace, may_grow: str | None = None):
        self.out, self.resumes = Path(args.out), args.resume
        self.checkpoint_every = args.checkpoint_every
        self.state_file = self.out / "checkpoint" / "state.pt"
        self.metrics_file, self.settings_file = self.out / "metrics.jsonl", self.out / "args.json"
        ignored = ("out", "resume", "device", "checkpoint_every")
        self.settings = {key: value for key, value in vars(args).items() if key not in ignored}
        self.settings["script"] = Path(sys.argv[0]).name
        on_first(lambda: self._look(may_grow))
        self.state, self.interrupted, self.writer = None, False, None
        if self.resumes and self.state_file.exists():
            try:
                self.state = torch.load(self.state_file, map_location="cpu", weights_only=True)
                before = dict(self.state["run"])
            except Exception as error:
                reason = f"not a checkpoint of this program ({first_line(error)})"
                raise UserError(f"{self.state_file}: {reason}") from None
        else:
            before = {"lines": 0, "seconds": 0.0}
        self.lines, self.saved = before["lines"], time.monotonic()
        self.started = self.saved - before["seconds"]
        self.is_finished = bool(self.state and self.state.get("finished"))

    def _look(self, may_grow: str | None) -> None:
        """Raise UserError if the folder holds a run that this one does not continue."""
        for key in ("model", "base", "orm", "genrm"):
            if name := self.settings.get(key):
                self.settings[f"{key}_fingerprint"] = fingerprint(name, f"--{key}")
        for key in ("scores", "references", "train_samples"):
            if files := self.settings.get(key):
                files = [files] if isinstance(files, str) else files
                self.settings[f"{key}_fingerprint"] = checksum(files)
        if self.out.is_dir():
            lock(self.out)
        if self._holds_run():
            before, now = read_json(self.settings_file), self.settings
            changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
            changed -= {"token_budget", "gen_batch_size", "recompute"}  # they only change rounding
            if isinstance(before.get(may_grow), int) and before[may_grow] <= now[may_grow]:
                changed -= {may_grow}
            names = ", ".join(sorted(changed))
            require(not changed, f"--resume: {self.out} was started with other settings ({names})")

    def _holds_run(self) -> bool:
        """Return whether the folder holds a run. Raises UserError unless --resume is given."""
        found = any((self.out / name).exists() for name in self.OUTPUTS)
        advice = "add --resume to continue it, delete it, or choose another --out"
        require(self.resumes or not found, f"{self.out} already holds a run: {advice}")
        return found

    def begin(self) -> None:
        """Prepare the folder. Nothing in it is touched before the inputs have been loaded."""
        on_first(self._prepare)
        signal.signal(signal.SIGINT, self._interrupt)

    def _prepare(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        lock(self.out)
        self._holds_run()  # another run may have come and gone while the model was loaded
        for name in ("checkpoint", "samples"):
            (self.out / name).mkdir(exist_ok=True)
        write_json(self.settings_file, self.settings)
        old, new = self.out / "model.old", self.out / "model"
        if old.exists() and not new.exists():  # killed between two renames
            old.rename(new)
        self.metrics_file.touch()
        text = self.metrics_file.read_text(errors="replace")
        lines = text.splitlines(keepends=True)[: self.lines]
        with atomic_write(self.metrics_file) as file:  # later lines will be logged again
            file.write("".join(lines).encode())
        self._start_tensorboard(lines)

    def _start_tensorboard(self, lines: list[str]) -> None:
        """Write the lines of metrics.jsonl that were kept. Do nothing without TensorBoard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        remove(self.out / "tensorboard")
        self.writer = SummaryWriter(str(self.out / "tensorboard"))
        for line in lines:
            self._write_scalars(json.loads(line))

    def _write_scalars(self, row: dict) -> None:
        """Write the numbers of a row over samples. If samples do not grow, over steps."""
        if self.writer:
            x = row["step"] if "epoch" in row else row.get("samples", row["step"])
            for key, value in row.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(key, value, x)
            self.writer.flush()

    def _interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print(
            "\nstopping once everything is saved; a second Ctrl-C stops at once",
            file=sys.stderr,
            flush=True,
        )

    def clock(self) -> float:
        """Return the seconds of this run, interruptions left out."""
        return time.monotonic() - self.started

    def log(self, **metrics) -> None:
        """Append one object to metrics.jsonl and print it."""
        metrics = {"step": metrics["step"], "seconds": round(self.clock(), 1)} | metrics
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        append(self.metrics_file, json.dumps(row) + "\n")
        self._write_scalars(row)
        self.lines += 1
        tqdm.write("  ".join(f"{key} {value}" for key, value in row.items()))

    def checkpoint(self, now: bool = False, **state) -> None:
        """Save `state` if it is time, if `now` is set, or after Ctrl-C. After Ctrl-C stop."""
        self.interrupted = any_process(self.interrupted)
        is_time = time.monotonic() - self.saved >= self.checkpoint_every
        if (now or self.interrupted or is_time) and process_rank() == 0:
            state["run"] = {"lines": self.lines, "seconds": self.clock()}
            with atomic_write(self.state_file) as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # its zip writer hides that the disk is full
                    reason = first_line(error.__context__ or error)
                    raise UserError(f"{self.state_file}: could not be written ({reason})") from None
            self.saved = time.monotonic()
        if self.interrupted:
            any_process(True)  # wait until rank 0 has saved
            raise KeyboardInterrupt

    def finish(self, **state) -> None:
        """Mark the run as complete. Its checkpoint keeps only `state`."""
        self.checkpoint(now=True, finished=True, **state)


# ---- 4. The command line -------------------------------------------------------------------------


def number(kind: type, low: float, high: float = 2**63 - 1):
    """Return an argparse type: an int or float within [low, high]."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    limits = f"{low:g} to {high:g}" if high < 2**63 - 1 else f"at least {low:g}"
    parse.__name__ = f"{'whole ' * (kind is int)}number ({limits})"  # argparse prints it
    return parse


WHOLE, NOT_NEGATIVE = number(int, 1), number(float, 0)
# The flags with a default here belong to every script.
FLAGS = {
    "problem and model": {
        "model": dict(help="folder or hub name of the model; tiny: the one in this repository"),
        "dataset": dict(
            default="arithmetic",
            help="arithmetic, arithmetic-hard, gsm8k, svamp, or a file or folder of problems",
        ),
        "limit_train": dict(type=WHOLE, metavar="N", help="use the first N training problems"),
        "limit_eval": dict(default=None, type=WHOLE, metavar="N", help="measure on N problems"),
        "device": dict(default="auto", help="auto, cpu, cuda, cuda:1, ..."),
        "dtype": dict(
            default="auto",
            choices=["auto", "float32", "bfloat16"],
            help="arithmetic; auto: bfloat16 on GPU",
        ),
    },
    "sampling": {
        "max_new_tokens": dict(default=128, type=WHOLE, help="most tokens of a solution"),
        "temperature": dict(type=NOT_NEGATIVE, help="sampling temperature; 0: greedy"),
        "samples": dict(type=WHOLE, help="samples per problem, K (paper: 96; PPO: 4)"),
        "gen_batch_size": dict(
            default=None, type=WHOLE, help="sequences sampled at once (default: 256; GPU: 1024)"
        ),
    },
    "training": {
        "lr": dict(type=NOT_NEGATIVE, help="peak learning rate (paper: 2e-5; PPO: 1e-6)"),
        "epochs": dict(type=WHOLE, help="passes over the data; PPO: over each phase (paper: 4)"),
        "batch_size": dict(type=WHOLE, help="solutions per step (paper: 128; PPO: 256)"),
        "token_budget": dict(
            default=None, type=WHOLE, help="tokens per micro-batch (default: 1024; GPU: 32768)"
        ),
        "lora_rank": dict(
            type=number(int, 0), help="rank of adapters; 0: train all weights (paper, PPO: 128)"
        ),
        "frozen_dtype": dict(
            choices=["auto", "float32", "bfloat16"],
            help="weights below adapters; auto: bfloat16 on GPU",
        ),
        "recompute": dict(
            action="store_true", help="run layers again in the backward pass, for less memory"
        ),
    },
    "run": {
        "out": dict(help="folder of the run"),
        "seed": dict(default=0, type=number(int, 0), help="seed of the samples and the data order"),
        "checkpoint_every": dict(type=NOT_NEGATIVE, help="seconds between checkpoints"),
        "resume": dict(default=False, action="store_true", help="go on with the run in --out"),
    },
}


# The defaults of the scripts that train, beside their own.
TRAINING = dict(limit_train=None, lora_rank=0, frozen_dtype="auto", recompute=False)


class OneLineParser(argparse.ArgumentParser):
    """A parser that shows defaults. A wrong flag or value ends in one line and exit code 2."""

    def parse_args(self, *argv):
        args = super().parse_args(*argv)
        for flag, value in vars(args).items():
            values = value if isinstance(value, list) else [value]
            # Only a path begins with "~".
            values = [os.path.expanduser(v) if isinstance(v, str) else v for v in values]
            if "" in values:
                self.error(f"--{flag.replace('_', '-')} is empty")
            setattr(args, flag, values if isinstance(value, list) else values[0])
        if "lora_rank" in args:
            self.only_with("--lora-rank", args.lora_rank != 0, args, "frozen_dtype")
        name = args.device
        on_gpu = torch.cuda.is_available() if name == "auto" else name.startswith("cuda")
        args.gen_batch_size = args.gen_batch_size or (1024 if on_gpu else 256)
        # On a CPU small micro-batches pad less and stay in its cache.
        args.token_budget = args.token_budget or (32768 if on_gpu else 1024)
        return args

    def group(self, title: str):
        """Return the group of flags with this title. Add it if it is new."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def only_with(self, condition: str, holds: bool, args, *flags: str) -> None:
        """Refuse a flag that does nothing unless the condition holds. A resumed run may have it."""
        goes_on = args.resume and (Path(args.out) / "args.json").exists()
        for flag in flags:
            if not holds and not goes_on and getattr(args, flag) != self.get_default(flag):
                self.error(f"--{flag.replace('_', '-')} does nothing without {condition}")

    def error_if(self, wrong, message: str) -> None:
        if wrong:
            self.error(message)

    def error(self, message: str):
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def common_parser(doc: str, **defaults) -> OneLineParser:
    """Return a parser with the flags of every script and the ones that have a default here.

    --help shows the first and the last paragraph of the docstring: summary and examples.
    """
    summary, *_, examples = doc.strip().split("\n\n")
    about = f"{summary}\n\n{examples}\n\nThe docstring at the top of the file explains the rest."
    how = dict(usage="%(prog)s [flags]", formatter_class=HelpFormatter, allow_abbrev=False)
    parser = OneLineParser(description=about, **how)
    parser._optionals.title = "this script"
    for title, flags in FLAGS.items():
        for name, how in flags.items():
            how = how | {"default": defaults[name]} if name in defaults else how
            if "default" in how:
                parser.group(title).add_argument("--" + name.replace("_", "-"), **how)
    return parser


class Output:
    """Standard output or error. The run goes on if nobody reads it any more.

    After Ctrl-C in `python sft.py 2>&1 | tee log` tee is gone, and every print would fail.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, RuntimeError):  # a signal handler may interrupt a print
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run_main(main: Callable) -> None:
    """Run `main(sys.argv[1:])`. A UserError becomes one line and exit code 2, Ctrl-C code 130."""
    if not isinstance(sys.stdout, Output):
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows a line when it is written
    try:
        start_processes()
        main(sys.argv[1:])
    except ModuleNotFoundError as error:
        ours = error.name in ("adapters", "rcrl", "reward_model")  # a fork may lack them
        advice = f"copy {error.name}.py next to the script" if ours else "install it"
        print(f"error: {error}; {advice}", file=sys.stderr)
        sys.exit(2)
    except (UserError, OSError, RuntimeError, MemoryError) as error:
        if not isinstance(error, (UserError, OSError)):
            if not is_out_of_memory(error):
                raise
            error = f"out of memory; lower --token-budget or add --recompute ({first_line(error)})"
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if process_rank() == 0:
            print("stopped; the same command with --resume goes on from here", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
