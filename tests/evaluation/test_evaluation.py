"""Whole evaluations, as a user runs them: models of every kind, mistakes, interruptions, leaks."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import running
from adapters import causal, classifier, make_adapter
from documents import DOCUMENTS
from stagecraft import places
from stagecraft.errors import UserError
from stagecraft.evaluation import from_config, subjects

SCRIPT = "evaluate_model.py"
TOLD = ("perplexity", "bits_per_byte", "answer_accuracy", "choice_accuracy", "preference_accuracy")
LIKELIHOODS = {
    "perplexity",
    "bits_per_byte",
    "choice_accuracy",
    "preference_accuracy",
    "end_of_turn",
    "implicit_margin",
}


@pytest.fixture(scope="module", autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    running.kill_what_is_left()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation folder with a handful of rows of each kind."""
    folder = tmp_path_factory.mktemp("eval")
    asked = [f"{text[:20]} {n}?" for n, text in enumerate(DOCUMENTS[:24])]
    write(folder / "documents.jsonl", [{"text": text} for text in DOCUMENTS[:12]])
    write(folder / "answers.jsonl", [{"question": q, "answer": "water", "split": "fact"} for q in asked])
    options = ["Rest at home.", "多喝水。", "See a doctor when it lasts."]
    write(
        folder / "choices.jsonl",
        [{"question": q, "options": options, "answer": options[n % 3]} for n, q in enumerate(asked[:8])],
    )
    pair = {"response_chosen": "Rest at home and drink water.", "response_rejected": "不知道。"}
    write(folder / "preferences.jsonl", [{"question": q} | pair for q in asked[:8]])
    write(folder / "questions.jsonl", [{"question": "发烧怎么办？"}, {"question": "Why?"}])
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("adapter") / "adapter", strength=0.1)


@pytest.fixture(scope="module")
def merged(tiny_base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete model of base and adapter, by PEFT."""
    from peft import PeftModel

    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("merged") / "model")
    PeftModel.from_pretrained(causal(tiny_base), adapter).merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("reward") / "model")
    torch.manual_seed(3)
    classifier(tiny_base).save_pretrained(folder)
    return folder


def evaluate(folder: Path, rows: Path, *flags: object, **settings: Any) -> running.Ended:
    asked = ["--eval_dir", rows, "--max_new_tokens", 12, "--batch_size", 8, *flags]
    return running.run(SCRIPT, folder, asked, **settings)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def numbers(folder: Path, model: str) -> dict[str, tuple[float, ...]]:
    """Value and interval of every metric of a model but the one that a clock gives."""
    return {
        f"{m['metric']} {m['split']}": (m["value"], m["low"], m["high"])
        for m in report(folder)["metrics"]
        if m["model"] == model and m["metric"] != "tokens_per_second"
    }


def replies(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["replies"] for line in lines]


# ---- Models of every kind


def test_an_adapter_and_the_model_it_makes_get_the_same_numbers_and_the_base_others(
    tiny_base: Path, adapter: Path, merged: Path, reward: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    models = {"base": tiny_base, "whole": merged, "pair": f"{tiny_base}+{adapter}", "alone": adapter}
    words = [f"{name}={place}" for name, place in models.items()]
    done = evaluate(
        out, rows, "--models", *words, f"inside={adapter}", "--merge_lora", "inside", "--reward_model", reward
    )
    assert done.status == 0, done
    whole = numbers(out, "whole")
    # Margin and wins are told against the model before, which differs from column to column.
    apart = {"implicit_margin None", "reward_win_rate None"}
    for name in ("pair", "alone", "inside"):
        found = numbers(out, name)
        assert found.keys() == whole.keys() >= apart
        for metric in whole.keys() - apart:
            assert found[metric] == pytest.approx(whole[metric], abs=1e-4, rel=1e-4), (name, metric)
        assert found["implicit_margin None"][0] == pytest.approx(0, abs=1e-4)
        assert found["reward_win_rate None"][0] == pytest.approx(0.5)
    base = numbers(out, "base")
    assert base["perplexity None"][0] != pytest.approx(whole["perplexity None"][0], rel=1e-3)
    for told in replies(out):
        assert told["whole"] == told["pair"] == told["alone"] == told["inside"]
    assert any(told["base"] != told["whole"] for told in replies(out))
    value = report(out)
    assert [(s["name"], s["kind"]) for s in value["subjects"]] == [
        ("base", "folder"),
        ("whole", "folder"),
        ("pair", "adapter"),
        ("alone", "adapter"),
        ("inside", "adapter"),
        ("rm", "reward"),
    ]
    assert {s["template"] for s in value["subjects"][:-1]} == {subjects.template_hash(tiny_base)}
    assert value["settings"]["max_new_tokens"] == 12 and value["settings"]["engine"] == "transformers"
    assert value["notes"] == ["inside: the adapter was merged in memory before it was measured"]
    [judged] = [m for m in value["metrics"] if m["model"] == "rm"]
    assert (judged["metric"], judged["n"]) == ("reward_accuracy", 8)
    assert {"DONE", "answers.jsonl", "report.html", "report.md"} <= {path.name for path in out.iterdir()}
    assert not (out / "kept").exists() and "make chat RECIPE=out" in done.said


def test_an_adapter_answers_by_its_own_tokenizer_and_template(
    tiny_base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(adapter, tmp_path / "own")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_base / name, own / name)
    template = own / "chat_template.jinja"
    template.write_text("Now: " + template.read_text(encoding="utf-8"), encoding="utf-8")
    out = tmp_path / "out"
    few = ("--max_eval_samples", 4)
    done = evaluate(out, rows, *few, "--models", f"plain={tiny_base}+{adapter}", f"own={tiny_base}+{own}")
    assert done.status == 0, done
    hashes = [subject["template"] for subject in report(out)["subjects"]]
    assert (
        hashes == [subjects.template_hash(tiny_base), subjects.template_hash(own)] and hashes[0] != hashes[1]
    )
    [note] = report(out)["notes"]
    assert note.startswith(f"the models have different chat templates (plain {hashes[0]}, own {hashes[1]})")
    assert numbers(out, "own")["choice_accuracy None"]
    assert any(told["own"] != told["plain"] for told in replies(out))


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_base, tmp_path / "other")
    model = causal(tiny_base)
    model.model.embed_tokens.weight.data.mul_(1.01)
    model.save_pretrained(other)
    with pytest.raises(UserError) as caught:
        places.read_place("sft", f"{other}+{adapter}", "--models sft")
    assert str(caught.value) == (
        f"--models sft {adapter}: was trained on other weights than those of the base {other} (adapter_config.json "
        f"names {tiny_base}); give that base, or take that name out of adapter_config.json if you know better (the "
        "same weights in another dtype)"
    )
    small = make_small(tmp_path / "small", tiny_base)
    with pytest.raises(
        UserError, match=r"^--models sft .*: does not fit the base .*\(14 modules do not fit\)$"
    ):
        places.read_place("sft", f"{small}+{adapter}", "--models sft")
    assert places.read_place("sft", f"{tiny_base}+{adapter}", "--models sft").base == str(
        tiny_base
    )  # control


def make_small(folder: Path, base: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base)
    config.hidden_size = 16
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_folder_whose_name_has_a_plus(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = tmp_path / "a+b"
    base.symlink_to(tiny_base)
    second = tmp_path / "c+d"
    second.symlink_to(adapter)
    assert places.read_place("x", str(base), "--models x").kind == "folder"
    place = places.read_place("x", f"{base}+{second}", "--models x")
    assert (place.base, place.adapter) == (str(base), str(second))


# ---- A server


@pytest.fixture(scope="module")
def server(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` with the merged model, found in a hub's cache by the name kit/tiny."""
    home = tmp_path_factory.mktemp("home")
    cached = home / "hub" / "models--kit--tiny"
    shutil.copytree(merged, cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", "kit/tiny", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, home / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    last = time.monotonic() + 90
    while time.monotonic() < last and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def test_a_server_gives_the_replies_of_its_folder(
    server: str, merged: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = evaluate(out, rows, "--models", f"folder={merged}", f"served={server}#kit/tiny")
    assert done.status == 0, done
    for told in replies(out):
        assert told["folder"] == told["served"]
    assert len({told["served"] for told in replies(out)}) > 1
    folder, served = numbers(out, "folder"), numbers(out, "served")
    gone = {metric.split()[0] for metric in folder.keys() - served.keys()}
    assert gone == LIKELIHOODS - {"implicit_margin"}
    for metric in served.keys() - {"reward_win_rate None"}:
        assert served[metric] == pytest.approx(folder[metric]), metric  # lengths and stops, too
    [note] = report(out)["notes"]
    assert note.startswith("served: a server gives replies only")
    assert report(out)["subjects"][1] == {
        "name": "served",
        "path": f"{server}#kit/tiny",
        "kind": "server",
        "template": None,
    }


def test_servers_that_can_not_be_asked_are_told(server: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    words = ("--models", f"a={nobody}", f"b={server}#kit/other", "--output_dir", tmp_path / "out")
    first, second, *rest = faults_of(*words)
    assert not rest
    assert first.startswith(f"--models a {nobody}: nobody answers there")
    assert second == f'--models b {server}: serves no model "kit/other" (there: kit/tiny)'


# ---- Mistakes


def faults_of(*words: object) -> list[str]:
    """The lines of the error that the script gives; it must not get as far as to import torch."""
    script = importlib.import_module("evaluate_model")
    argv, sys.argv = sys.argv, [SCRIPT, *map(str, words)]
    try:
        with pytest.raises(UserError) as caught:
            script.main()
    finally:
        sys.argv = argv
    return str(caught.value).splitlines()


def test_all_faults_of_a_start_at_once_and_before_torch_is_imported(
    tiny_base: Path, reward: Path, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    plain = shutil.copytree(tiny_base, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    (tmp_path / "DONE").write_text("eval\n")
    words = [f"a={tiny_base}", f"a={tiny_base}", f"b={tmp_path}/adapter", f"c={tmp_path}/none", "junk"]
    words += [f"d={plain}", f"e={tiny_base}+{tmp_path}/none", f"{'n' * 25}={tiny_base}", f"f={reward}"]
    expected = [
        "--batch_size must be at least 1, not 0",
        "--beta must be above 0, not 0.0",
        '--models "a=',
        f"--models b {tmp_path}/adapter: a None adapter; only LoRA can be merged",
        f"--models b {tmp_path}/adapter: adapter_model.safetensors is missing",
        f"--models c {tmp_path}/none: no such folder",
        '--models "junk": write name=folder',
        f"--models d {plain}: its tokenizer has no chat template",
        f"--models e {tiny_base}+{tmp_path}/none: {tmp_path}/none is no adapter",
        f'--models "{"n" * 25}=',
        f"--models f {reward}: a reward model, which writes no text",
        '--merge_lora g: no model of --models is called "g"',
        f"--merge_lora a: {tiny_base} is no adapter, so there is nothing to merge",
        f"--reward_model {tiny_base}: not a reward model",
        "--engine vllm: vLLM is not installed here",
        f"--eval_dir {tmp_path}: none of documents.jsonl",
        '--train_data "junk": write stage=folder',
        f"--train_data ppo={tmp_path}: the stages with training data are pt, sft, rm, dpo",
        f"--train_data pt {tmp_path}/none: no such",
        f"--output_dir {tmp_path}: holds a finished report (DONE); --overwrite_output_dir replaces it",
    ]
    flags = ["--models", *words, "--merge_lora", "g", "a", "--reward_model", tiny_base, "--beta", 0]
    flags += ["--train_data", "junk", f"ppo={tmp_path}", f"pt={tmp_path}/none", "--engine", "vllm"]
    flags += ["--eval_dir", tmp_path, "--output_dir", tmp_path, "--batch_size", 0]
    began = time.monotonic()
    done = run_script(SCRIPT, *flags)
    assert time.monotonic() - began < 5  # torch and transformers alone take longer
    assert done.returncode == 2 and done.stdout == "" and (tmp_path / "DONE").exists()
    lines = done.stderr.splitlines()
    for part in expected:
        assert any(line.startswith(part) for line in lines), (part, lines)
    assert len(lines) <= len(expected) + 1, lines


def test_no_models_and_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = faults_of("--models", "--output_dir", tmp_path / "file", "--eval_dir", tmp_path / "none")
    assert lines == [
        "--models: name at least one model, e.g. sft=outputs-sft/tiny/model",
        f"--eval_dir {tmp_path / 'none'}: no such folder",
        f"--output_dir {tmp_path / 'file'}: is a file; name a folder",
    ]


# ---- --from_config


def test_a_file_of_the_merge_guide(tiny_base: Path, adapter: Path, rows: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "evaluation.yaml"
    file.write_text(
        f"""eval_dir: {rows}
max_new_tokens: 4
models:
  base: {{model_path: {tiny_base}, is_lora: false}}
  lora: {{model_path: {adapter}, is_lora: true, base_model: {tiny_base}}}
  merged:
    model_path: {adapter}
    is_lora: true
    merge_lora: true
"""
    )
    done = running.run(SCRIPT, out, ["--from_config", file, "--max_eval_samples", 4])
    assert done.status == 0, done
    value = report(out)
    assert [(s["name"], s["path"]) for s in value["subjects"]] == [
        ("base", str(tiny_base)),
        ("lora", f"{tiny_base}+{adapter}"),
        ("merged", str(adapter)),
    ]
    assert value["settings"]["max_new_tokens"] == 4 and value["settings"]["max_eval_samples"] == 4
    assert value["notes"] == ["merged: the adapter was merged in memory before it was measured"]
    assert numbers(out, "lora")["perplexity None"] == pytest.approx(
        numbers(out, "merged")["perplexity None"], rel=1e-4
    )


def test_a_list_of_models_means_the_same(tmp_path: Path, adapter: Path) -> None:
    mapping = {
        "a": {"model_path": "m", "base_model": "b"},
        "c": {"model_path": str(adapter), "merge_lora": True},
    }
    as_list = [{"name": name} | entry for name, entry in mapping.items()]
    expected = [("f:1", "models", ["a=b+m", f"c={adapter}"]), ("f:1", "merge_lora", ["c"])]
    for value in (mapping, as_list):
        faults: list[str] = []
        assert from_config.translated([("f:1", "models", value)], faults) == expected and faults == []
    plain = [("f:1", "models", ["a=m"]), ("f:2", "seed", 1)]
    assert from_config.translated(plain, []) == plain


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("a: {model_pth: m}", 'models: a: unknown key "model_pth"; did you mean "model_path"?'),
        ("a: {is_lora: true}", 'models: a: needs "model_path"'),
        ("a: {model_path: m, is_lora: maybe}", "models: a: is_lora must be true or false, not 'maybe'"),
        ("a: {model_path: BASE, is_lora: true}", "models: a: is_lora is true, but BASE is no adapter"),
        ("a: {model_path: LORA, is_lora: false}", "models: a: is_lora is false, but LORA is an adapter"),
        ("a: {model_path: BASE, base_model: b}", "models: a: base_model is for an adapter; leave it out"),
        ("a: {model_path: BASE, merge_lora: true}", "models: a: merge_lora is for an adapter; leave it out"),
        ("a: {model_path: 'http://x', is_lora: true}", "models: a: a server has no is_lora"),
        ("- {model_path: m}", "models: entry 1 has no name"),
        (
            "a: {model_path: m}\nmax_new_token: 4",
            'unknown key "max_new_token"; did you mean "max_new_tokens"?',
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(
    entry: str, fault: str, tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    def filled(text: str) -> str:
        return text.replace("BASE", str(tiny_base)).replace("LORA", str(adapter))

    file = tmp_path / "e.yaml"
    head, _, tail = filled(entry).partition("\n")
    file.write_text(f"seed: 1\nmodels:\n  {head}\n{tail}\n")
    lines = faults_of("--from_config", file, "--output_dir", tmp_path / "out")
    [line] = [line for line in lines if line.startswith(f"{file}:{4 if tail else 2}: ")]
    assert filled(fault) in line
    assert not [line for line in lines if "no such folder" in line]  # a file that is wrong is not followed


# ---- Interruptions


def lines_kept(folder: Path, task: str = "answers") -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"kept/*/{task}.jsonl"))


def test_a_killed_evaluation_goes_on_to_the_same_numbers(
    tiny_base: Path, merged: Path, reward: Path, rows: Path, tmp_path: Path
) -> None:
    flags = ["--eval_dir", rows, "--models", f"base={tiny_base}", f"sft={merged}", "--reward_model", reward]
    flags += ["--max_new_tokens", 24, "--batch_size", 2]
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert running.run(SCRIPT, plain, flags).status == 0

    killed = running.start(SCRIPT, out, flags)
    killed.until(lambda: lines_kept(out) >= 3)
    killed.send(signal.SIGKILL)
    killed.wait()
    answers = lines_kept(out)
    assert 3 <= answers < 12 and not (out / "DONE").exists()

    stopped = running.start(SCRIPT, out, flags)
    stopped.until(lambda: lines_kept(out, "documents") >= 1)
    stopped.send(signal.SIGINT)
    ended = stopped.wait()
    assert ended.status == 75, ended
    assert ended.lines[-1] == (
        "eval: stopped by SIGINT; what was measured is kept, the same command goes on from there"
    )
    assert "base: answers, 24 rows in" in ended.said and f"({2 * answers} of them kept" in ended.said

    # One reply of those that are kept is changed, to see that it is taken from there; then it is put back.
    [kept] = out.glob("kept/*/answers.json")
    whole = kept.read_text(encoding="utf-8")
    first = json.loads(whole)["results"][0][0]
    other = shutil.copytree(out, tmp_path / "changed")
    value = json.loads(whole)
    value["results"][0][0] = "changed"
    (other / kept.relative_to(out)).write_text(json.dumps(value))
    assert running.run(SCRIPT, other, flags).status == 0

    assert running.run(SCRIPT, out, flags).status == 0
    for name in ("base", "sft", "rm"):
        assert numbers(out, name) == numbers(plain, name)
    assert report(out)["comparisons"] == report(plain)["comparisons"]
    assert report(out)["questions"] == report(plain)["questions"]
    assert replies(out) == replies(plain) and replies(out)[0]["base"] == first
    assert replies(other)[0]["base"] == "changed" and replies(other)[1:] == replies(plain)[1:]  # control
    assert not (out / "kept").exists() and (out / "DONE").exists()


def test_other_settings_or_weights_take_nothing_from_before(
    tiny_base: Path, merged: Path, rows: Path, tmp_path: Path
) -> None:
    def flags(model: Path, new: int) -> list[object]:
        return ["--eval_dir", rows, "--models", f"m={model}", "--max_new_tokens", new, "--batch_size", 2]

    out = tmp_path / "out"
    started = running.start(SCRIPT, out, flags(tiny_base, 24))
    started.until(lambda: lines_kept(out) >= 3)
    started.send(signal.SIGKILL)
    started.wait()
    for model, new, kept in ((merged, 24, False), (tiny_base, 23, False), (tiny_base, 24, True)):
        copy = running.copy_of(out, tmp_path / f"{model.parent.name}-{new}-{kept}")
        done = running.run(SCRIPT, copy, flags(model, new))
        assert done.status == 0 and ("kept from the interrupted run" in done.said) is kept, done


# ---- Leaks


def test_rows_that_training_has_seen_are_told_and_left_out(
    tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    seen = json.loads((rows / "answers.jsonl").read_text(encoding="utf-8").splitlines()[2])["question"]
    chat = [{"from": "human", "value": seen}, {"from": "gpt", "value": "Rest."}]
    write(data / "sft" / "rows.jsonl", [{"conversations": chat}])
    write(data / "pt" / "rows.jsonl", [{"text": "Something else altogether."}])
    found = {}
    for name, folder in (("leaky", data / "sft"), ("clean", tmp_path / "data2")):
        if name == "clean":
            chat[0]["value"] = "Another question"
            write(folder / "rows.jsonl", [{"conversations": chat}])
        out = tmp_path / name
        done = evaluate(
            out, rows, "--models", f"m={tiny_base}", "--train_data", f"sft={folder}", f"pt={data / 'pt'}"
        )
        assert done.status == 0, done
        [n] = [m["n"] for m in report(out)["metrics"] if m["metric"] == "answer_accuracy"]
        found[name] = (n, len(replies(out)), len(report(out)["leaks"]), done.said)
    assert found["clean"][:3] == (24, 24, 0) and "leaks: 0 of 52" in found["clean"][3]
    n, rows_told, leaks, said = found["leaky"]
    assert n == rows_told == 24 - 1 and leaks >= 1
    assert f"answers.jsonl:3 is in {data / 'sft' / 'rows.jsonl'}:1 (100%): {seen}" in said
    assert "evaluation rows stand in" in said and "are left out" in said
