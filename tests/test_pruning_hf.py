"""PruneCallback in a real Trainer: masks hold, checkpoints have plain keys, and training goes on bit for bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import sparsekern as sk
from sparsekern import pruning

pytestmark = pytest.mark.transformers
STEPS = 12  # three epochs of four


class Words(Dataset):
    """Sixteen sentences of eight words; the label is whether the first is in the upper half."""

    def __init__(self):
        self.x = torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": int(self.x[i, 0] >= 25)}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def callback(*arguments, **settings):
    from sparsekern.pruning.hf import PruneCallback

    return PruneCallback(*arguments, **settings)


def trainer(out, *callbacks, model=None, **settings):
    from transformers import Trainer, TrainingArguments

    defaults = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
        "save_strategy": "steps", "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **defaults | settings)
    return Trainer(
        model or bert(), arguments, train_dataset=Words(), eval_dataset=Words(), callbacks=list(callbacks)
    )  # fmt: skip


def weights(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def query(model) -> torch.Tensor:
    return model.bert.encoder.layer[0].attention.self.query.weight.detach()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that prunes after step 3 and was not stopped: its folder and its weights."""
    out = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = trainer(out, callback("2:4", start=3))
    run.train()
    run.save_model(str(out / "final"))
    yield out, weights(run.model)
    torch.set_num_threads(before)


def test_what_is_saved_is_finalized_and_loads_back(whole):
    from transformers import BertForSequenceClassification

    out, state = whole
    assert state.keys() == bert().state_dict().keys()
    model = BertForSequenceClassification.from_pretrained(out / "final")
    assert equal(weights(model), state)
    patterns = {layer.name: layer.pattern for layer in pruning.verify(model).layers}
    assert set(patterns.values()) == {"2:4"}
    packed, _ = pruning.sparsify(model)
    assert isinstance(packed.bert.encoder.layer[0].output.dense, sk.SparseLinear)


@pytest.mark.parametrize("step", [2, 4, 8])
def test_every_checkpoint_is_a_plain_model_and_goes_on_bit_for_bit(whole, tmp_path, step):
    from transformers import BertForSequenceClassification

    out, state = whole
    folder = out / f"checkpoint-{step}"
    model = BertForSequenceClassification.from_pretrained(folder)
    assert sk.is_24(query(model)) is (step > 3)
    assert (folder / "masks.safetensors").exists() is (step > 3)
    shutil.copytree(folder, tmp_path / folder.name)
    run = trainer(tmp_path, callback("2:4", start=3))
    run.train(resume_from_checkpoint=str(tmp_path / folder.name))
    assert equal(weights(run.model), state)


@pytest.mark.parametrize("masks", ["none", "of others", "broken"])
def test_without_its_masks_what_is_zero_stays_pruned(whole, tmp_path, caplog, masks):
    out, _ = whole
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(out / "checkpoint-4", folder)
    (folder / "masks.safetensors").unlink()
    if masks != "none":
        from safetensors.torch import load_file, save_file

        found = load_file(out / "checkpoint-4" / "masks.safetensors")
        change = (lambda bits: ~bits) if masks == "of others" else (lambda bits: bits[1:])
        save_file(
            {name: change(bits) for name, bits in found.items()}, folder / "masks.safetensors"
        )
    run = trainer(tmp_path, callback("2:4", start=3))
    run.train(resume_from_checkpoint=str(folder))
    assert "what is zero in its weights stays pruned" in caplog.text
    assert sk.is_24(query(run.model))
    assert run.state.global_step == STEPS


def test_the_pattern_holds_at_every_step_after_pruning(tmp_path):
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(sk.is_24(query(model)))

    run = trainer(tmp_path, callback("2:4", start=5), Watch(), save_strategy="no")
    run.train()
    assert seen == [False] * 5 + [True] * 7


def test_a_list_of_patterns_is_spread_from_start_to_end(tmp_path):
    densities = ["density=0.8", {"classifier": "density=0.5"}, "density=0.2"]
    chosen = lambda layer, name: "query" in name or name == "classifier"  # noqa: E731
    prune = callback(densities, start=0.5, end=2, unit="epochs", filter_fn=chosen)
    run = trainer(tmp_path, prune, save_strategy="no")
    run.train()
    assert [step for step, _ in prune.reports] == [2, 5, 8]
    state = weights(run.model)
    assert (query(run.model) != 0).float().mean() == pytest.approx(0.2, abs=0.01)
    assert (state["classifier.weight"] != 0).float().mean() == pytest.approx(0.2, abs=0.02)
    assert (state["bert.pooler.dense.weight"] != 0).all()


def test_the_best_model_is_one_from_after_the_pruning(tmp_path):
    # The loss of every evaluation before the pruning is lower.
    losses = iter(range(10))
    run = trainer(
        tmp_path, callback("2:4", start=4), load_best_model_at_end=True, eval_strategy="steps",
        eval_steps=2, metric_for_best_model="eval_rank", greater_is_better=False,
    )  # fmt: skip
    run.compute_metrics = lambda prediction: {"rank": next(losses)}
    run.train()
    assert run.state.best_metric == 2
    assert run.state.best_model_checkpoint.endswith("checkpoint-6")
    assert sk.is_24(query(run.model))
    assert list(pruning.masks(run.model)) == []


def test_masks_stay_on_request_and_are_saved_as_plain_keys(tmp_path):
    run = trainer(tmp_path, callback("2:4", finish=False), save_strategy="no")
    run.train()
    assert len(list(pruning.masks(run.model))) == 8
    assert run.model.state_dict().keys() == bert().state_dict().keys()
    run.model.load_state_dict(weights(run.model))
    wrapped = nn.ModuleDict({"inner": run.model})
    assert all("parametrizations" not in name for name in wrapped.state_dict())


def test_a_head_tied_to_the_embedding_stays_dense(tmp_path):
    from transformers import BertForMaskedLM

    base = bert().config
    model = BertForMaskedLM(base)
    report = {layer.name: layer for layer in pruning.prune(model)}
    assert report["cls.predictions.decoder"].skipped.startswith("shares its weight with bert.embed")
    assert report["cls.predictions.transform.dense"].density == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "3:2"}, "pattern N:M takes"),
        ({"unit": "days"}, "unit is 'days'; it takes steps or epochs"),
        ({"pattern": ["2:4", "1:4"]}, "end is None with 2 patterns"),
        ({"end": 5}, "end is 5 with 1 patterns"),
        ({"pattern": []}, "end is None with 0 patterns"),
        ({"start": -1}, "start is -1 and end None"),
        ({"pattern": ["2:4", "1:4"], "start": 5, "end": 3}, "start is 5 and end 3"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        callback(**settings)


def test_a_pruning_that_would_never_come_is_an_error(tmp_path):
    run = trainer(tmp_path, callback("2:4", start=3, unit="epochs"))
    with pytest.raises(ValueError, match=r"comes after step 12; training ends at 12"):
        run.train()


def test_sharded_training_is_refused(tmp_path):
    run = trainer(tmp_path, callback("2:4"))
    run.args.deepspeed = {"zero_optimization": {"stage": 3}}
    prune = next(c for c in run.callback_handler.callbacks if type(c).__name__ == "PruneCallback")
    with pytest.raises(ValueError, match=r"deepspeed cuts weights into shards"):
        prune.on_train_begin(run.args, run.state, run.control, run.model)
