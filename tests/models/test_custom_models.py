"""Architectures of the user's own, by the worked example in docs/, and the check that keeps leaky ones out."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flame.errors import UserError
from flame.models.causal_lm import load_model_config
from flame.models.custom_model import import_custom_model
from flame.models.head_check import check_head
from flame.models.leak_check import check_no_leak, needs_leak_check
from flame.models.wrapper import TrainingModel
from flame.trainer.setup import build_modules
from tests.support.models import (
    CPU,
    build_unsharded,
    future_config,
    get_own,
    pack,
    random_batch,
    random_cu_seqlens,
    shard,
    tiny_llama,
)
from tests.support.paths import REPO
from tests.support.runs import final_weights, fork_ranks, run_here

EXAMPLE = REPO / "docs" / "examples" / "tiny_transformer"
CU = torch.tensor([0, 1, 25, 26, 50, 60], dtype=torch.int32)


@pytest.fixture(autouse=True)
def example() -> None:
    import_custom_model(str(EXAMPLE))


@pytest.fixture
def registries() -> Iterator[None]:
    """What a test registers and imports is gone after it."""
    configs, models = CONFIG_MAPPING._extra_content, AutoModelForCausalLM._model_mapping._extra_content
    before = dict(configs), dict(models), set(sys.modules), list(sys.path)
    yield
    for registry, content in zip((configs, models), before, strict=False):
        registry.clear()
        registry.update(content)
    for name in set(sys.modules) - before[2]:
        del sys.modules[name]
    assert sys.path == before[3]


def build_example(**changes: object) -> TrainingModel:
    """Two layers of 32, weights large enough that every path shows."""
    config = load_model_config(str(EXAMPLE))
    for key, value in {"hidden_size": 32, "vocab_size": 61, "initializer_range": 0.2, **changes}.items():
        setattr(config, key, value)
    return build_unsharded(future_config(), config)


@torch.no_grad()
def encode(model: TrainingModel, batch, direction: str, window_k: int = 0) -> torch.Tensor:
    return model.encode_past(batch) if direction == "causal" else model.encode_future(batch, window_k)


# ---------------------------------------------------------------- the worked example


@pytest.mark.slow
def test_the_command_of_the_documentation_trains(tmp_path):
    text = (EXAMPLE.parent.parent / "custom_models.md").read_text()
    (command,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "train.sh" in block]
    arguments = shlex.split(command.replace("\\\n", " ").replace("exp/tiny_transformer", str(tmp_path / "run")))
    arguments += ["--training.steps", "1"]
    done = subprocess.run(arguments, cwd=EXAMPLE.parent.parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_trains_and_its_export_loads(workspace, tmp_path):
    changes = {"experimental__custom_model_path": EXAMPLE, "model__config": EXAMPLE / "config.json"}
    rows = run_here(workspace, tmp_path / "run", **changes, checkpoint__export_hf=True)
    assert len(rows) == 6 and rows[-1]["ce_loss"] < rows[0]["ce_loss"] and rows[-1]["aux_loss"] > 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    weights = {k.removeprefix("lm."): v for k, v in final_weights(tmp_path / "run").items() if k.startswith("lm.")}
    plain = AutoModelForCausalLM.from_config(exported.config).eval()
    missing, strange = plain.load_state_dict(weights, strict=False)
    assert not strange and set(missing) <= {"lm_head.weight"}
    tokens = torch.arange(20)[None]
    assert torch.equal(exported(tokens).logits, plain(tokens).logits)
    exported.generation_config.eos_token_id = None
    written = exported.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(written[0, 20:], exported(written).logits[0, 19:-1].argmax(-1))


@pytest.mark.parametrize("window_k", [0, 3])
def test_no_leak(window_k):
    model = build_example()
    batch = random_batch(CU)
    for direction in ("causal", "future"):
        base = encode(model, batch, direction, window_k)
        for j in range(60):
            tokens = batch.input_ids[0].clone()
            tokens[j] = (tokens[j] + 1) % 61
            changed = (encode(model, pack(tokens, CU), direction, window_k) != base).any(-1).nonzero().flatten().tolist()
            start, end = int(CU[j >= CU].max()), int(CU[j < CU].min())
            first = max(start, j - 2 * window_k) if window_k else start
            low, high = (j, end - 1) if direction == "causal" else (first, j)
            assert changed == list(range(low, high + 1)), (direction, j)


def test_packed_equals_one_by_one():
    model = build_example()
    cu = random_cu_seqlens(80, 7, seed=3)
    batch = random_batch(cu)
    for direction in ("causal", "future"):
        packed = encode(model, batch, direction)
        for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            alone = pack(batch.input_ids[0, start:end], torch.tensor([0, end - start], dtype=torch.int32))
            torch.testing.assert_close(packed[start:end], encode(model, alone, direction), rtol=1e-4, atol=1e-4)


def test_the_logits_are_those_of_the_two_passes():
    """Without a mask the example is causal, as `generate` and lm-eval need it."""
    model = build_example()
    batch = random_batch(torch.tensor([0, 30], dtype=torch.int32))
    with torch.no_grad():
        expected = model.lm(batch.input_ids, attention_mask=torch.ones_like(batch.input_ids)).logits[0]
    found = encode(model, batch, "causal") @ model.output_embedding.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the check at startup


def breaking(model: TrainingModel, **changes) -> TrainingModel:
    """Arguments of the base model replaced on the way in, each by a function of the original."""

    def change(module, args, kwargs):
        return args, {key: changes[key](value) if key in changes else value for key, value in kwargs.items()}

    model.lm.base_model.register_forward_pre_hook(change, with_kwargs=True)
    return model


LEAKS = {
    "no mask at all": ({"attention_mask": torch.ones_like}, "reads across documents"),
    "its own causal mask": ({"attention_mask": lambda mask: torch.ones_like(mask).tril()}, "reads across documents"),
    "documents, but no direction": ({"attention_mask": lambda mask: mask | mask.mT}, "its causal pass sees the future"),
    "always causal": (
        {"attention_mask": lambda mask: (mask | mask.mT).tril()},
        "its anti-causal pass sees the past",
    ),
    "positions of the pack": (
        {"position_ids": lambda ids: torch.arange(ids.shape[1])[None]},
        "it must take positions from position_ids",
    ),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_leaks_are_found(leak):
    changes, expected = LEAKS[leak]
    with pytest.raises(UserError) as error:
        check_no_leak(breaking(build_example(), **changes), CPU, with_future=True)
    text = str(error.value)
    assert expected in text and 'model_type "tiny_transformer"' in text and "cannot be trained" in text


def test_positions_of_the_pack_are_found_where_they_weigh_little():
    """As where embeddings are normalised before small positions are added."""
    changes, expected = LEAKS["positions of the pack"]
    model = breaking(build_example(), **changes)
    with torch.no_grad():
        model.lm.model.embed_positions.weight.mul_(0.03)
    with pytest.raises(UserError, match=expected):
        check_no_leak(model, CPU, with_future=True)


HEADS = {
    "a factor": lambda logits, states: logits * 0.5,
    "a cap far above the first logits": lambda logits, states: 30 * torch.tanh(logits / 30),
    "a norm before the head": lambda logits, states: logits / states.norm(dim=-1, keepdim=True),
}


@pytest.mark.parametrize("head", HEADS)
def test_logits_that_are_no_plain_product_are_found(head):
    """The loss is taken from hidden states times the output embedding, which would be another model then."""
    model, states = build_unsharded(future_config(), load_model_config(str(EXAMPLE))), []
    model.lm.base_model.register_forward_hook(lambda module, args, outputs: states.append(outputs.last_hidden_state))

    def change(module, args, outputs):
        outputs.logits = HEADS[head](outputs.logits, states[-1])

    model.lm.register_forward_hook(change)
    with pytest.raises(UserError, match=r"logits are not its base model's last hidden states times its output embedding"):
        check_head(model, CPU)


@pytest.mark.parametrize("takes", [{"input_ids"}, {"input_ids", "attention_mask"}])
def test_a_whole_model_need_not_take_what_the_base_model_takes(takes):
    model = build_example()
    forward = model.lm.forward
    model.lm.forward = {
        1: lambda input_ids: forward(input_ids),
        2: lambda input_ids, attention_mask: forward(input_ids, attention_mask=attention_mask),
    }[len(takes)]
    check_head(model, CPU)


def test_without_future_loss_only_the_causal_pass_counts():
    changes, _ = LEAKS["always causal"]
    check_no_leak(breaking(build_example(), **changes), CPU, with_future=False)


def test_a_leak_behind_weights_that_start_at_zero_is_found():
    """Residual branches often begin at zero, and then nothing reads anything."""
    model = breaking(build_example(), attention_mask=torch.ones_like)
    for layer in model.lm.model.layers:
        torch.nn.init.zeros_(layer.attention.o_proj.weight)
    with pytest.raises(UserError, match="reads across documents"):
        check_no_leak(model, CPU, with_future=True)
    assert not any(layer.attention.o_proj.weight.any() for layer in model.lm.model.layers)


def test_a_leak_behind_a_teacher_s_zero_weights_is_found():
    """A network that reads itself alone may be taught by one whose branches begin at zero."""
    model = build_unsharded(future_config(target="random"), load_model_config(str(EXAMPLE)))

    def see_all(module, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    model.objective.teacher.base_model.register_forward_pre_hook(see_all, with_kwargs=True)
    for layer in model.objective.teacher.model.layers:
        torch.nn.init.zeros_(layer.attention.o_proj.weight)
    with pytest.raises(UserError, match="reads across documents: in its anti-causal pass"):
        check_no_leak(model, CPU, True, *get_own(model).find_future_pass())
    check_no_leak(model, CPU, True)  # the language model's own is as it should be
    assert not any(layer.attention.o_proj.weight.any() for layer in model.objective.teacher.model.layers)


def test_passes_of_the_first_layers_alone_are_checked():
    for changes in ({}, {"target": "random"}):
        model = build_unsharded(future_config(layers=1, **changes), load_model_config(str(EXAMPLE)))
        future = get_own(model).find_future_pass()
        assert future.layers == (0 if changes else 1)
        check_no_leak(model, CPU, True, *future)


def test_a_model_that_runs_another_list_is_rejected():
    model = build_example()
    layers = list(model.lm.model.layers)
    model.lm.model.forward = _run_from_a_list_of_its_own(model.lm.model, layers)
    check_no_leak(model, CPU, True)
    with pytest.raises(UserError, match=r"runs more than the first 1 of its decoder layers.*future_encoder.layers to 0"):
        check_no_leak(model, CPU, True, layers=1)


def _run_from_a_list_of_its_own(base: torch.nn.Module, layers: list[torch.nn.Module]):
    forward = type(base).forward

    def run(*args, **kwargs):
        kept, base.layers = base.layers, torch.nn.ModuleList(layers)
        try:
            return forward(base, *args, **kwargs)
        finally:
            base.layers = kept

    return run


def test_a_forward_that_refuses_what_it_is_given_is_one_line():
    def refuse(_):
        raise TypeError("unexpected keyword argument")

    with pytest.raises(UserError, match=r"cannot run on packed documents.*TypeError: unexpected keyword"):
        check_no_leak(breaking(build_example(), position_ids=refuse), CPU, with_future=True)


@pytest.mark.parametrize("window_k", [0, 2])
@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "fsdp"])
def test_the_check_leaves_no_trace(sharded, window_k):
    """Weights, generators, modes, gradients; and what is gathered for the check does not outlive it."""
    if sharded:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        config = future_config()
        model = build_modules(config, load_model_config(str(EXAMPLE)), "cpu")
        shard(model, config, init_device_mesh("cpu", (1,)))
    else:
        model = build_example()
    model.train()
    model.lm.model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(7)
    np.random.seed(7)
    expected = torch.rand(3), np.random.rand()
    torch.manual_seed(7)
    np.random.seed(7)
    check_no_leak(model, CPU, with_future=True, window_k=window_k)
    assert torch.equal(torch.rand(3), expected[0]) and np.random.rand() == expected[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and model.lm.model.layers[0].training and not model.lm.model.norm.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        batch = random_batch(CU)
        assert not model(lambda root: root.encode_past(batch)).any()


def test_which_families_are_checked(tmp_path):
    assert needs_leak_check(load_model_config(str(EXAMPLE)))
    tiny_llama().save_pretrained(tmp_path)
    assert not needs_leak_check(load_model_config(str(tmp_path)))


def test_a_run_begins_with_the_check(workspace, tmp_path, monkeypatch, capsys):
    def refuse(model, device, with_future, window_k, network, layers):
        raise UserError(f"checked with {with_future}, {window_k}, {network}, {layers}")

    monkeypatch.setattr("flame.trainer.setup.check_no_leak", refuse)
    changes = {"experimental__custom_model_path": EXAMPLE, "model__config": EXAMPLE / "config.json"}
    with pytest.raises(SystemExit):
        run_here(workspace, tmp_path / "run", future_encoder__future_k=5, future_encoder__layers=1, **changes)
    assert "checked with True, 5, None, 1" in capsys.readouterr().err


def test_every_run_compares_its_logits_with_the_models_own(workspace, tmp_path, monkeypatch, capsys):
    """Also one of a tested family."""

    def refuse(model, device):
        raise UserError(f'checked the head of "{model.lm.config.model_type}"')

    monkeypatch.setattr("flame.trainer.setup.check_head", refuse)
    with pytest.raises(SystemExit):
        run_here(workspace, tmp_path / "run")
    assert 'checked the head of "llama"' in capsys.readouterr().err


def test_a_tested_family_passes():
    check_no_leak(build_unsharded(future_config()), CPU, with_future=True)


@pytest.mark.slow
def test_ranks_agree(workspace, tmp_path):
    """Two ranks, sharded: the run with the check in it is the run of one rank."""
    changes = {"experimental__custom_model_path": EXAMPLE, "model__config": EXAMPLE / "config.json", "training__steps": 2}
    one = run_here(workspace, tmp_path / "one", **changes)
    two = fork_ranks(2, workspace, tmp_path / "two", training__gradient_accumulation_steps=1, **changes)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-4)


# ---------------------------------------------------------------- the import

GOOD = """
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
class {name}Config(LlamaConfig):
    model_type = "{kind}"
class {name}Model(LlamaForCausalLM):
    config_class = {name}Config
AutoConfig.register("{kind}", {name}Config{extra})
AutoModelForCausalLM.register({name}Config, {name}Model{extra})
"""


def write(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def good(kind: str, name: str = "Own", extra: str = "") -> str:
    return GOOD.format(kind=kind, name=name, extra=extra)


def test_a_module_in_one_file(registries, tmp_path):
    path = write(tmp_path, "own_model.py", "import beside\n" + good("own_one"))
    write(tmp_path, "beside.py", "")
    import_custom_model(str(path))
    import_custom_model(str(path))  # once more is nothing
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own_one", "vocab_size": 61}))
    assert type(load_model_config(str(tmp_path))).__name__ == "OwnConfig"


def test_no_custom_model():
    import_custom_model("")


MISTAKES = {
    "missing": ({}, "own_pack", "does not exist"),
    "no __init__": ({"own_pack/model.py": ""}, "own_pack", "without __init__.py"),
    "not Python": ({"own.txt": ""}, "own.txt", "must be a .py file"),
    "no identifier": ({"own-pack/__init__.py": ""}, "own-pack", "Python identifier"),
    "syntax": (
        {"own_s/__init__.py": "from . import part", "own_s/part.py": "\ndef f(:\n"},
        "own_s",
        "part.py, line 2: SyntaxError",
    ),
    "import": ({"own_i.py": "\nimport no_such_package\n"}, "own_i.py", "own_i.py, line 2: ModuleNotFoundError: No module named"),
    "any error": ({"own_e.py": "\n\n1 / 0\n"}, "own_e.py", "own_e.py, line 3: ZeroDivisionError"),
    "nothing registered": ({"own_n.py": ""}, "own_n.py", "registers no causal language model"),
    "no configuration": (
        {"own_c.py": good("own_c").replace('AutoConfig.register("own_c", OwnConfig)', "")},
        "own_c.py",
        "registers a model for OwnConfig but not that configuration",
    ),
    "a family of transformers": ({"own_t.py": good("llama")}, "own_t.py", "'llama' is already used by a Transformers config"),
    "the same, by force": ({"own_f.py": good("llama", extra=", exist_ok=True")}, "own_f.py", 'registers model_type "llama"'),
    "another custom model": ({"own_o.py": good("tiny_transformer")}, "own_o.py", 'registers model_type "tiny_transformer"'),
    "a name of Python's": ({"json.py": ""}, "json.py", '"json" is the name of another Python module'),
    "an installed name": ({"flame/__init__.py": ""}, "flame", '"flame" is the name of another Python module'),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(registries, tmp_path, mistake):
    files, path, expected = MISTAKES[mistake]
    for name, code in files.items():
        write(tmp_path, name, code)
    with pytest.raises(UserError) as error:
        import_custom_model(str(tmp_path / path))
    (line,) = error.value.lines
    assert line.startswith("experimental.custom_model_path = ") and expected in line and "\n" not in line


def test_it_must_pass_the_checks_of_any_model(registries, tmp_path):
    code = """
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig
    class BareConfig(PretrainedConfig):
        model_type = "bare"
    class Bare(LlamaForCausalLM):
        config_class = BareConfig
    AutoConfig.register("bare", BareConfig)
    AutoModelForCausalLM.register(BareConfig, Bare)
    """
    import_custom_model(str(write(tmp_path, "bare_model.py", code)))
    (tmp_path / "config.json").write_text('{"model_type": "bare", "vocab_size": 61}')
    with pytest.raises(UserError, match="its configuration has no hidden_size"):
        load_model_config(str(tmp_path))
