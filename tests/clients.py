"""The programs that read an export, each in a process of its own, and whether it reads what was trained.

    python tests/clients.py --make               transformers 4.57 and 4.44, into runs/clients
    python tests/clients.py --make --llama-cpp   also llama.cpp's converter and library, which takes minutes to build
    python tests/clients.py --table              clients x exports, by the clients that are there

``exports`` makes four as a user does. ``expected`` is what a client should find in one: it follows from what the user
gave, from halny's encoder and from halny's model, never from a tokenizer in the export. A client answers in parts, and
``judge`` says of each part whether it is right. test_clients.py asserts what the table shows.

An environment is a folder that pip filled, put before the packages of this interpreter, so all clients have the same
torch. Everything under "reading" runs there: it imports nothing of halny, and this file's head only the standard
library.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "runs/clients" / f"python{sys.version_info.major}.{sys.version_info.minor}"  # of compiled packages
PROMPT = "The wind comes down the mountains"
N_NEW = 12
CLOSE = 1e-4  # between fp32 logits: a window one shorter moves them by 3e-2, another norm_eps by 1e-2, RoPE's by 2e-3
MESSAGES = [{"role": "user", "content": "Skąd wieje?"}, {"role": "assistant", "content": "Z gór."}]
AWKWARD = [
    *(" ", "  leading spaces", "trailing spaces  ", "two  spaces,   three", "a" + " " * 300 + "b"),
    *("\n", "\n\n  indented\n    more\n", "\ttabs\t\tand\t", "CR LF\r\nand CR\rend", "NUL \0 inside"),
    *("def f(x):\n    return x ** 2  # kwadrat\n", "3.14159 1,000,000 007", "Zażółć gęślą jaźń, ŁÓDŹ."),
    *("🦙 and 👩\u200d👩\u200d👧 and 🇵🇱", "e\u0301 o\u0328 n\u0303\u0323", "שלום עולם and مرحبا", "山から風が吹く。"),
    *("\ue000 private \U0010fffd", "\ufeffmark and \u200bzero width\u00a0space", "a lower bar ▁ and ▁▁ two"),
    *("literal </s> end", "<s>literal begin", "<unk><0x0A>", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>"),
]


def texts() -> list[str]:
    """The documents of the built-in corpus, and the awkward ones."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)] + AWKWARD


# --------------------------------------------------------------------------------------- exports, as a user makes them


@dataclass
class Export:
    path: Path
    source: str | Path  # the tokenizer: its folder, or its name
    settings: dict[str, dict]  # what should read back from config, generation_config and tokenizer
    chat: Callable[[list[dict]], str] | None = None  # what its template makes of messages


def exports(folder: Path) -> dict[str, Export]:
    """The four, made in a folder: of a small model with a vocabulary of real size, after three steps, in fp32."""
    from runs import Ranks

    from halny.model.data.tokenizer import MISTRAL
    from halny.model.prepare_data import prepare

    (folder / "corpus").mkdir()
    for i, text in enumerate(texts()[:20]):
        (folder / "corpus" / f"{i}.txt").write_text(text)
    chatml, own, (base, stop) = chatml_folder(folder), own_folder(folder), base_folder(folder)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    built = {
        "builtin": Export(sizes_folder(folder, 32000), MISTRAL, settings(1, 2, 0)),
        "chatml": Export(sizes_folder(folder, 32002), chatml, settings(1, 32001, 2), chatml_text),
        "own": Export(sizes_folder(folder, 32000), own, settings(0, 0, 0, tokenizer={"padding_side": "left"})),
        # a tokenizer has one end, a model may have several
        "init-from": Export(
            base, base, settings(1, [2, stop], 0, tokenizer={"eos_token_id": 2}, generation_config=sampling), base_text
        ),
    }
    few = ["--seq-len", 64, "--batch-tokens", 256, "--dtype", "fp32", "--export-dtype", "fp32", "--steps", 3]
    few += ["--eval-every", 0]
    runs = []
    for name, export in built.items():
        # so low a rate that what goes on from the base still writes the second of its ends
        model = ["--init-from", export.path, "--lr", "1e-6"] if name == "init-from" else ["--model", export.path]
        (folder / name).mkdir()
        if name != "builtin":
            prepare([folder / "corpus"], folder / name / "data", export.source, val_fraction=0.2, progress=False)
            model += ["--data", "data"]
        runs.append(Ranks(*few, *model, "--run-dir", "run", cwd=folder / name))
        export.path = folder / name / "run/export"
    for run in runs:
        assert run.codes() == [0], run.communicate()
    return built


def settings(bos: int, eos: int | list[int], pad: int | None, **more: dict) -> dict[str, dict]:
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {name: ids | more.get(name, {}) for name in ("config", "generation_config", "tokenizer")}


def small_config(vocab_size: int):
    from halny.model.mistral import PRESETS

    return replace(PRESETS["test"], vocab_size=vocab_size)


def sizes_folder(folder: Path, vocab_size: int) -> Path:
    """A config.json for --model, whose ids of tokens are Mistral's and not those of the data."""
    import torch

    from halny.model.hf_folder import hf_config

    return written(folder / f"sizes-{vocab_size}", {"config.json": hf_config(small_config(vocab_size), torch.float32)})


def written(folder: Path, files: dict[str, dict]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False))
    return folder


def special(token: str) -> dict:
    return {
        "content": token,
        **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
        "special": True,
    }


def tokenizer_folder(folder: Path, raw: dict, config: dict) -> Path:
    """A tokenizer.json and its config, as transformers 4 writes them: merges are strings, which 4.44 needs."""
    raw["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    config = {
        "added_tokens_decoder": {str(token["id"]): special(token["content"]) for token in raw["added_tokens"]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        **config,
    }
    return written(folder, {"tokenizer.json": raw, "tokenizer_config.json": config})


def mistral_folder(folder: Path, tokens: list[str], config: dict) -> Path:
    """Mistral-7B-v0.1's tokenizer with more special tokens, tokenizer.model included."""
    from halny.model.data.tokenizer import mistral_tokenizer

    raw = json.loads(mistral_tokenizer().files["tokenizer.json"])
    raw["added_tokens"] += [{"id": 32000 + i, **special(token)} for i, token in enumerate(tokens)]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    tokenizer_folder(folder, raw, named | {"add_bos_token": True, "add_eos_token": False, "legacy": True} | config)
    shutil.copyfile(sentencepiece_model(), folder / "tokenizer.model")
    return folder


def sentencepiece_model() -> Path:
    return Path(importlib.util.find_spec("mistral_common").origin).parent / "data/tokenizer.model.v1"


def chatml_folder(folder: Path) -> Path:
    """A chat model's tokenizer: two more tokens, one of them its end, and a template in tokenizer_config.json."""
    tokens = ["<|im_start|>", "<|im_end|>"]
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    named = {"eos_token": tokens[1], "pad_token": "</s>", "additional_special_tokens": tokens}
    template = {"chat_template": "{% for message in messages %}" + turn + "{% endfor %}"}
    mistral_folder(folder / "chatml-tokenizer", tokens, named | template)
    beside = {"added_tokens.json": {token: 32000 + i for i, token in enumerate(tokens)}}
    beside |= {"special_tokens_map.json": {"bos_token": "<s>", "unk_token": "<unk>", **named}}
    return written(folder / "chatml-tokenizer", beside)


def chatml_text(messages: list[dict]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def own_folder(folder: Path) -> Path:
    """A user's own vocabulary: byte-level BPE, with the end of a text as its first entry, filled up to 32,000.

    That end is its unknown token too, as GPT-2's is, because CTranslate2 reads no tokenizer without one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end, letters = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = dict(vocab_size=4000, special_tokens=[end], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(**options))
    raw = json.loads(tokenizer.to_str())
    raw["model"]["vocab"] |= {f"<unused{i}>": i for i in range(len(raw["model"]["vocab"]), 32000)}
    config = {f"{name}_token": end for name in ("bos", "eos", "pad", "unk")}
    config |= {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    return tokenizer_folder(folder / "own-tokenizer", raw, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def base_folder(folder: Path) -> tuple[Path, int]:
    """A model to go on from, and the second of its ends: a token that it writes, so that who does not stop is seen."""
    import torch
    from tokenizers import Tokenizer

    from halny.model.convert import save_hf
    from halny.model.mistral import Mistral

    model, base = Mistral(small_config(32000)), folder / "base"
    model.init_weights(seed=1)
    save_hf(model, base)
    mistral_folder(base, [], {"pad_token": "<unk>"})
    turn = "{{message['role'] + ': ' + message['content'] + eos_token}}"
    (base / "chat_template.jinja").write_text("{% for message in messages %}" + turn + "{% endfor %}")
    ids = Tokenizer.from_file(str(base / "tokenizer.json")).encode(PROMPT).ids
    stop = model.generate(torch.tensor([ids]), N_NEW)[0, len(ids) + N_NEW // 2].item()
    ends = {"bos_token_id": 1, "eos_token_id": [2, stop], "pad_token_id": 0}
    config = json.loads((base / "config.json").read_text()) | ends
    generation = ends | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    return written(base, {"config.json": config, "generation_config.json": generation}), stop


def base_text(messages: list[dict]) -> str:
    return "".join(f"{m['role']}: {m['content']}</s>" for m in messages)


# ------------------------------------------------------------------------------------------ what is right, and judging


def expected(export: Export) -> dict:
    """Part of an answer -> what it should be (None where the export has no such thing), and what a job names."""
    import torch
    from tokenizers import Tokenizer

    from halny.model.convert import load_hf
    from halny.model.data.tokenizer import MISTRAL, Encoder, load_tokenizer

    tokenizer, given = load_tokenizer(export.source), Path(export.source) / "tokenizer.json"
    raw = json.loads(tokenizer.files["tokenizer.json"] if export.source == MISTRAL else given.read_bytes())
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    vocabulary = raw["model"]["vocab"] | added
    backend = Tokenizer.from_str(json.dumps(raw))
    model, prompt = load_hf(export.path), backend.encode(PROMPT).ids
    sequence = torch.randint(3, 32000, (1, 40), generator=torch.Generator().manual_seed(0))
    assert sequence.shape[1] > model.config.window
    new = model.generate(torch.tensor([prompt]), N_NEW)[0, len(prompt) :].tolist()
    eos = export.settings["config"]["eos_token_id"]
    ends = [i for i, token in enumerate(new) if token in (eos if isinstance(eos, list) else [eos])]
    chat = export.chat and export.chat(MESSAGES)
    return {
        "sequence": sequence[0].tolist(),
        "window": model.config.window,
        "ids": [ids.tolist() for ids in Encoder(tokenizer).encode(texts())],
        "logits": model(sequence)[0].detach().numpy(),
        "generated": prompt + (new[: ends[0] + 1] if ends else new),
        "settings": export.settings,
        "chat": chat and [chat, backend.encode(chat, add_special_tokens=False).ids],
        "vocabulary": sorted(vocabulary, key=vocabulary.get),
        "scores": None if "<0x00>" not in vocabulary else scores(set(added.values())),
    }


NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # llama.cpp's types of tokens


def scores(added: set[int]) -> list[list]:
    """(score, type) by id, from Mistral-7B-v0.1's SentencePiece model; nothing reads the scores of special tokens."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(str(sentencepiece_model()))
    n = max(sp.vocab_size(), *(i + 1 for i in added))
    types = [CONTROL if i in added else BYTE if sp.is_byte(i) else NORMAL for i in range(n)]
    return [[None if kind == CONTROL else sp.get_score(i), kind] for i, kind in enumerate(types)]


def judge(expected: dict, answer: dict) -> dict[str, tuple[bool, str]]:
    """Part of the answer -> whether it is right, and a few words. An answer without parts is wrong."""
    judged = {}
    for part, got in answer.items() or [("reading", {"error": "no answer"})]:
        try:
            judged[part] = _judged(part, expected.get(part), got)
        except Exception as error:
            judged[part] = False, f"{type(error).__name__}: {error}"
    return judged


def _judged(part: str, wanted, got) -> tuple[bool, str]:
    if isinstance(got, dict) and "error" in got:
        return False, got["error"]
    if part == "ids":
        right = sum(ours == theirs for ours, theirs in zip(wanted, got, strict=True))
        return right == len(wanted), f"{right}/{len(wanted)}"
    if part == "logits":
        import numpy as np

        theirs = np.load(got)
        error = np.abs(theirs - wanted[: len(theirs)]).max()  # NaN is not close
        return bool(error <= CLOSE), f"{error:.0e}"
    if part == "settings":
        values = [(of, key, value) for of, keys in got.items() for key, value in keys.items()]
        wrong = [f"{of}.{key} {value!r}" for of, key, value in values if value != wanted[of][key]]
        return bool(values) and not wrong, ", ".join(wrong) or "="
    if part in ("vocabulary", "scores"):
        wrong = sum(ours != theirs for ours, theirs in zip(wanted, got, strict=True))
        return not wrong, f"{wrong} differ" if wrong else "="
    return got == wanted, "=" if got == wanted else f"{got}"


# ----------------------------------------------------------------------------------------- reading, as each client does


def attempted(job: dict, parts: dict[str, Callable]) -> dict:
    """The answers of the parts that a job has, or the error in its place: a part that fails hides no other."""
    answer = {}
    for name in parts.keys() & {*job["parts"], "reading"}:
        try:
            answer[name] = parts[name]()
        except Exception as error:
            answer[name] = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
    return {name: answer[name] for name in parts if name in answer}


def read_transformers(export: str, job: dict) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = cache(lambda: AutoTokenizer.from_pretrained(export))
    model = cache(lambda: AutoModelForCausalLM.from_pretrained(export, attn_implementation="eager").eval())

    def read_settings():
        generation = GenerationConfig.from_pretrained(export)
        held = {"config": model().config, "generation_config": generation, "tokenizer": tokenizer()}
        return {of: {key: getattr(held[of], key) for key in keys} for of, keys in job["settings"].items()}

    def generate():
        inputs = tokenizer()(PROMPT, return_tensors="pt")
        return model().generate(**inputs, max_new_tokens=N_NEW, do_sample=False)[0].tolist()

    def chat():
        text = tokenizer().apply_chat_template(MESSAGES, tokenize=False)
        return [text, tokenizer()(text, add_special_tokens=False)["input_ids"]]

    parts = {
        "ids": lambda: tokenizer()(job["texts"], add_special_tokens=False, split_special_tokens=True)["input_ids"],
        "vocabulary": lambda: tokenizer().convert_ids_to_tokens(range(len(tokenizer()))),
        "logits": lambda: logits_of(model(), job),
        "generated": generate,
        "settings": read_settings,
        "chat": chat,
    }
    return attempted(job, parts)


def logits_of(model, job: dict) -> str:
    import torch

    with torch.no_grad():
        return saved(model(torch.tensor([job["sequence"]])).logits[0].numpy(), job)


def saved(logits, job: dict) -> str:
    """Logits go by file, being millions of numbers."""
    import numpy as np

    np.save(job["file"], logits)
    return job["file"]


def read_ctranslate2(export: str, job: dict) -> dict:
    import ctranslate2
    import numpy as np
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as folder:
        TransformersConverter(export).convert(folder, force=True)
        vocabulary, config = (json.loads(Path(folder, f"{name}.json").read_text()) for name in ("vocabulary", "config"))
        generator = ctranslate2.Generator(folder, compute_type="float32")
    tokens = [vocabulary[i] for i in job["sequence"][: job["window"]]]  # of more it gives the last logits only
    ends = {f"{name}_token_id": vocabulary.index(config[f"{name}_token"]) for name in ("bos", "eos")}
    parts = {"vocabulary": lambda: vocabulary, "settings": lambda: {"tokenizer": ends}}
    return attempted(job, parts | {"logits": lambda: saved(np.array(generator.forward_batch([tokens]))[0], job)})


# llama.cpp knows by a hash of ids how a byte-level tokenizer splits text, and converts no other: whoever has a
# vocabulary of their own adds it to get_vocab_base_pre, as its message says and this does.
CONVERT = """
import runpy, sys
folder = sys.argv.pop(1)
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def read_llama_cpp(export: str, job: dict) -> dict:
    sys.path.insert(0, str(FOLDER / "llama.cpp/gguf-py"))
    from gguf import GGUFReader
    from jinja2 import Template
    from llama_cpp import Llama

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/f32.gguf"
        arguments = [FOLDER / "llama.cpp", export, "--outfile", file, "--outtype", "f32"]
        done = subprocess.run([sys.executable, "-c", CONVERT, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        held = {name.removeprefix("tokenizer."): field.contents() for name, field in GGUFReader(file).fields.items()}
        # keys and values in fp32 (0), where its default is half precision
        model = Llama(file, n_ctx=64, logits_all=True, type_k=0, type_v=0, verbose=False)

    def ids(text: str, special: bool) -> list[int]:
        return model.tokenize(text.encode(), add_bos=False, special=special)

    def logits():
        inside = job["sequence"][: job["window"]]  # it has no sliding window for Mistral
        model.eval(inside)
        return saved(model.scores[: len(inside)], job)

    def scores():
        pairs = zip(held["ggml.scores"], held["ggml.token_type"], strict=True)
        kinds = {UNKNOWN: CONTROL}  # which <unk> is only where a tokenizer_config.json has an added_tokens_decoder
        return [[score if kind in (NORMAL, BYTE) else None, kinds.get(kind, kind)] for score, kind in pairs]

    def chat():
        named = {f"{name}_token": held["ggml.tokens"][held[f"ggml.{name}_token_id"]] for name in ("bos", "eos")}
        text = Template(held["chat_template"]).render(messages=MESSAGES, **named)
        return [text, ids(text, True)]

    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    parts = {
        "ids": lambda: [ids(text, False) for text in job["texts"]],
        "logits": logits,
        "vocabulary": lambda: held["ggml.tokens"],
        "scores": scores,
        "settings": lambda: {"tokenizer": {key: held.get(f"ggml.{name}_token_id") for key, name in names.items()}},
        "chat": chat,
    }
    return attempted(job, parts)


def read_lm_eval(export: str, job: dict) -> dict:
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=export, device="cpu", dtype="float32", batch_size=1)
    lm.tokenizer.split_special_tokens = True  # its tok_encode passes no such argument on
    ends = {"bos_token_id": lm.prefix_token_id, "eos_token_id": lm.eot_token_id}
    parts = {
        "ids": lambda: [lm.tok_encode(text, add_special_tokens=False) for text in job["texts"]],
        "logits": lambda: logits_of(lm.model, job),
        "settings": lambda: {"tokenizer": ends},
    }
    return attempted(job, parts)


class Client(NamedTuple):
    read: Callable[[str, dict], dict]
    folders: tuple[str, ...] = ()  # those of runs/clients that come first on its path
    package: str = "transformers"  # of this interpreter, which it needs
    remedy: str = "python tests/clients.py --make"
    distribution: str | None = None  # whose version is its own; None: package

    @property
    def version(self) -> str:
        places = {"path": [str(FOLDER / folder) for folder in self.folders]} if self.folders else {}
        found = importlib.metadata.distributions(name=self.distribution or self.package, **places)
        return next((each.version for each in found), "")


CLIENTS = {
    "transformers": Client(read_transformers),
    "ctranslate2": Client(read_ctranslate2, (), "ctranslate2", "pip install ctranslate2"),
    "transformers-4.57": Client(read_transformers, ("transformers-4.57",)),
    "transformers-4.44": Client(read_transformers, ("transformers-4.44",)),
    "llama.cpp": Client(
        read_llama_cpp,
        ("llama-cpp-python", "llama.cpp"),
        remedy="python tests/clients.py --make --llama-cpp",
        distribution="llama_cpp_python",
    ),
    "lm_eval": Client(read_lm_eval, (), "lm_eval", "pip install lm_eval[hf]"),
}


def absent(name: str) -> str | None:
    """What would provide a client that is not there."""
    client = CLIENTS[name]
    there = all((FOLDER / folder).is_dir() for folder in client.folders) and importlib.util.find_spec(client.package)
    return None if there else f"{name} is absent: {client.remedy}"


def parts_asked(name: str, export: Export, right: dict) -> list[str]:
    """Those that the export has, less what a client does not know from the user's own folder either."""
    unknown = ["chat"] if name == "transformers-4.44" and (export.path / "chat_template.jinja").exists() else []
    return [part for part, value in right.items() if value is not None and part not in unknown]


def answers(name: str, built: dict[str, Export], right: dict[str, dict], folder: Path) -> dict[str, dict]:
    """Export -> what a client says of it, in one process of its own for all of them."""
    jobs = {}
    for of, export in built.items():
        jobs[of] = {key: right[of][key] for key in ("sequence", "window", "settings")}
        jobs[of] |= {"export": str(export.path), "texts": texts(), "file": str(folder / f"{name}-{of}.npy")}
        jobs[of] |= {"parts": parts_asked(name, export, right[of])}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if CLIENTS[name].folders:
        environment["PYTHONPATH"] = os.pathsep.join(str(FOLDER / part) for part in CLIENTS[name].folders)
    # -P: tests/ has folders named kernels, data and record, which are not to be found as packages
    command = [sys.executable, "-P", __file__, "--read", name]
    done = subprocess.run(command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {of: {"reading": {"error": error}} for of in built}
    return json.loads(done.stdout)


def read(name: str) -> None:
    """The process of a client: jobs from stdin, answers to stdout, and whatever else is printed to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name.startswith("transformers-4"):
        sys.modules["kernels"] = None  # transformers 4 imports today's kernels and fails at what has changed in it
    answered = {}
    for of, job in json.load(sys.stdin).items():
        answer = attempted(job, {"reading": partial(CLIENTS[name].read, job["export"], job)})
        answered[of] = answer if "error" in answer["reading"] else answer["reading"]
    json.dump(answered, out)
    out.close()


# ---------------------------------------------------------------------------------------------------- the command line


def table(folder: Path) -> str:
    """Markdown; what is wrong is bold."""
    built = exports(folder)
    right = {of: expected(export) for of, export in built.items()}
    rows = [["client", *built], ["---"] * (len(built) + 1)]
    for name in CLIENTS:
        remedy = absent(name)
        found = {} if remedy else answers(name, built, right, folder)
        rows.append(
            [
                remedy or f"{name} ({CLIENTS[name].version})",
                *(cell(judge(right[of], found[of])) if found else "" for of in built),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(judged: dict[str, tuple[bool, str]]) -> str:
    """Parts of which the same is to be said stand together."""
    parts: dict[tuple[bool, str], list[str]] = {}
    for part, said in judged.items():
        parts.setdefault(said, []).append(part)
    said = [(right, f"{' '.join(names)} {words[:80]}".replace("|", "\\|")) for (right, words), names in parts.items()]
    return ", ".join(words if right else f"**{words}**" for right, words in said)


def make(name: str, fill: Callable[[Path], None]) -> None:
    """A folder of runs/clients, filled beside its place so that a half-made one does not count."""
    target, beside = FOLDER / name, FOLDER / f"{name}.partial"
    if target.exists():
        print(f"{target} is there already; remove it to make it again")
        return
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    fill(beside)
    beside.rename(target)
    print(f"{target} is made")


def pip(command: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments], check=True)


def install(packages: list[str | Path], folder: Path) -> None:
    pip("install", "--no-warn-conflicts", "--target", folder, *packages)


def fetch_llama_cpp(folder: Path) -> None:
    """llama.cpp as the source of llama-cpp-python holds it, and that source."""
    pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, "llama-cpp-python")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    for part in source.iterdir():
        part.rename(folder / part.name)
    shutil.rmtree(source.parents[1])


def make_all(llama_cpp: bool) -> None:
    for version in ("4.57", "4.44"):
        packages = [f"transformers=={version}.*", "sentencepiece", "protobuf"]
        make(f"transformers-{version}", partial(install, packages))
    if llama_cpp:
        make("llama.cpp", fetch_llama_cpp)
        source = next((FOLDER / "llama.cpp").glob("*.tar.gz"), "llama-cpp-python")
        make("llama-cpp-python", partial(install, [source]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", help="make the environments that are not there")
    parser.add_argument("--llama-cpp", action="store_true", help="llama.cpp's too")
    parser.add_argument("--table", action="store_true", help="print what each client makes of each export")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--read", metavar="CLIENT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        read(chosen.read)
    if chosen.make:
        make_all(chosen.llama_cpp)
    if chosen.table:
        sys.path.insert(0, str(REPO))  # runs.py imports train.py
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as in tests: what is compared is fp32 on the CPU
        with tempfile.TemporaryDirectory() as folder:
            text = table(Path(folder))
        print(text, end="")
        if chosen.out:
            chosen.out.write_text(text)


if __name__ == "__main__":
    main()
