"""Processes that train together: what they send each other, and what happens when one of them ends."""

import hashlib
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

from conftest import make_config, make_model
from regard.config_train import TrainConfig
from regard.data.batches import Batch
from regard.data.shards import prepare
from regard.errors import RunError
from regard.training import checkpoint as checkpoints
from regard.training.changes import common_settings
from regard.training.cluster import Cluster, joined, left_alone
from regard.training.gradients import Gradients
from regard.training.loop import Trainer, train
from regard.training.objective import loss_of
from regard.training.optimizer import RANDOM
from regard.training.progress import Reporter
from regard.training.run import Run
from regard.training.sharding import own, shard
from regard.training.standing import Standing

CPU = torch.device("cpu")


def started(rank, size, port, folder, work):
    """The body of one process: join, work, and write what came of it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        with joined(CPU) as cluster:
            result = work(cluster)
    except RunError as error:
        result = f"RunError: {error}"
    (folder / str(rank)).write_text(str(result))


def run_together(body, size, *given):
    """Run body(rank, size, port, *given) in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(body, (size, port, *given), nprocs=size)


def together(tmp_path, size, work):
    """What each of so many processes found."""
    run_together(started, size, tmp_path, work)
    return [(tmp_path / str(rank)).read_text() for rank in range(size)]


def talk(cluster):
    values = [torch.tensor([0.1 * 3**piece, 1.0]) for piece in range(5)[cluster.part]]
    ordered = cluster.sum_in_order(values, 5).tolist()
    total = cluster.sum(sum(values)).tolist()
    state = cluster.agree_on({"a": torch.arange(3), "b": torch.ones(2, 2)} if cluster.is_first else {})
    told = cluster.agree({"score": 3.5, "names": ["x"]} if cluster.is_first else None)
    return ordered, [round(one, 4) for one in total], {name: each.tolist() for name, each in state.items()}, told


def unlike(cluster):
    cluster.refuse_unlike("data", "same")
    cluster.refuse_unlike("data", f"digest of {min(cluster.rank, 1)}")


def leave(cluster):
    if cluster.rank == 1:
        os._exit(0)
    return cluster.sum(torch.ones(3)).tolist()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_find_what_one_alone_finds(tmp_path, size):
    alone = talk(Cluster(0, 1, CPU))
    assert together(tmp_path, size, talk) == [str(alone)] * size


@pytest.mark.slow
def test_a_process_with_other_data_ends_all(tmp_path):
    first, second, third = together(tmp_path, 3, unlike)
    assert first.startswith("RunError: process 0 of 3: 2 of the processes have other data than the first. Give all")
    assert "this one has digest of 1" in second and "this one has digest of 1" in third


def otherwise(cluster):
    cluster.refuse_other_settings({"train.steps": 5, "precision": "float32"})
    cluster.refuse_other_settings({"train.steps": 5, "train.seed": min(cluster.rank, 1)})


@pytest.mark.slow
def test_a_process_with_other_settings_ends_all(tmp_path):
    first, second = together(tmp_path, 2, otherwise)
    assert first == ("RunError: process 0 of 2: 1 of the processes have other settings than the first. Give all of "
                     "them the same config")
    assert "other settings than the first: train.seed = 1 here and 0 in the first. Give all" in second


@pytest.mark.parametrize("setting", [{"learning_rate": 0.5}, {"seed": 9}, {"minutes": 3}])
def test_settings_that_all_must_share(tmp_path, setting):
    config = make_config(tmp_path)
    other = config.model_copy(update={"train": config.train.model_copy(update=setting)})
    assert common_settings(config, "float32") != common_settings(other, "float32")


def test_settings_that_are_a_machine_s_own(tmp_path):
    config = make_config(tmp_path)
    own = {"threads": 7, "device": "cuda", "precision": "bfloat16", "start_from": tmp_path}
    other = config.model_copy(update={"train": config.train.model_copy(update=own)})
    assert common_settings(config, "float32") == common_settings(other, "float32")
    assert common_settings(config, "float32") != common_settings(config, "bfloat16")


@pytest.mark.slow
def test_those_that_are_left_alone_say_so(tmp_path):
    (tmp_path / "1").write_text("")
    first, _ = together(tmp_path, 2, leave)
    assert "RunError: process 0 of 2: another process of this training has ended" in first
    assert "torchrun --max-restarts" in first


def trained(rank, size, port, config, out):
    """The body of one process that trains."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(config, out, quiet=True)


def train_together(config, out, size, steps=12):
    """The losses of all updates, and the digest of the weights and the optimizer's state at the end."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    if size == 1:
        train(config, out, quiet=True)
    else:
        run_together(trained, size, config, out)
    run = Run.open(out)
    last = checkpoints.load(run.checkpoints()[-1])
    tensors = {**last.model, **{name: each for name, each in last.optimizer.items() if not name.startswith(RANDOM)}}
    digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    return [row["loss"] for row in run.metrics() if row["kind"] == "train"], digest


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_any_number_of_processes_trains_the_same_model(corpus, tmp_path, deterministic):
    """With dropout; sharing ends and begins anew in the middle."""
    config = make_config(corpus, "transformer-post", accumulate=4, deterministic=deterministic)
    found = {size: train_together(config, tmp_path / str(size), size) for size in (1, 2, 4)}
    train_together(config, tmp_path / "changed", 2, steps=8)
    found["2, then 1"] = train_together(config, tmp_path / "changed", 1)
    losses, digest = found.pop(1)
    assert len(losses) == 12
    for how, (others, other_digest) in found.items():
        assert others == (losses if deterministic else pytest.approx(losses, abs=1e-5)), how
        assert not deterministic or other_digest == digest, how


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer-post", "after-general", "conv"])
def test_weights_that_are_shared_out_learn_the_same(corpus, tmp_path, name):
    """With dropout, an average of the weights, an uneven number of pieces; sharing ends and begins in the middle."""
    settings = {"accumulate": 3, "ema": 0.9, "weight_decay": 0.1, "average": 2}
    together, alone = (make_config(corpus, name, shard=shard, **settings) for shard in (True, False))
    losses, _ = train_together(alone, tmp_path / "alone", 1)
    assert train_together(together, tmp_path / "2", 2)[0] == pytest.approx(losses, abs=1e-5)
    train_together(together, tmp_path / "changed", 2, steps=8)
    assert train_together(alone, tmp_path / "changed", 1)[0] == pytest.approx(losses, abs=1e-5)
    train_together(alone, tmp_path / "other", 1, steps=8)
    assert train_together(together, tmp_path / "other", 2)[0] == pytest.approx(losses, abs=1e-5)
    runs = [Run.open(tmp_path / folder) for folder in ("alone", "2", "changed", "other")]
    first, *others = (checkpoints.load(run.checkpoints()[-1]) for run in runs)
    for other in others:
        for part in ("model", "optimizer"):
            expected, found = getattr(first, part), getattr(other, part)
            assert expected.keys() == found.keys()
            for each in expected.keys() - {f"{RANDOM}cpu"}:
                torch.testing.assert_close(found[each], expected[each], rtol=0, atol=1e-3)
    scores = [[row["loss"] for row in run.metrics() if row["kind"] == "valid"] for run in runs]
    assert all(each == pytest.approx(scores[0], abs=1e-4) for each in scores)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_each_optimizer_moves_weights_that_are_shared_out(corpus, tmp_path, optimizer):
    together, alone = (make_config(corpus, "transformer-post", shard=shard, optimizer=optimizer, accumulate=2,
                                   learning_rate=0.05) for shard in (True, False))
    losses, _ = train_together(alone, tmp_path / "alone", 1, steps=6)
    assert train_together(together, tmp_path / "together", 2, steps=6)[0] == pytest.approx(losses, abs=1e-5)


@pytest.mark.slow
def test_attention_is_guided_too_where_weights_are_shared_out(corpus, tmp_path):
    lines = (corpus / "train.source").read_text().splitlines()
    (corpus / "train.align").write_text("".join("0-0\n" if line.split() else "\n" for line in lines))
    config = make_config(corpus, "transformer-post", accumulate=2)
    first, = config.data.train
    data = config.data.model_copy(update={"train": [first.model_copy(update={"alignment": "train.align"})]})
    together, alone = (config.model_copy(update={"data": data, "train": config.train.model_copy(update={
        "guided_alignment": 0.5, "shard": shard})}) for shard in (True, False))
    losses, _ = train_together(alone, tmp_path / "alone", 1, steps=4)
    assert train_together(together, tmp_path / "together", 2, steps=4)[0] == pytest.approx(losses, abs=1e-5)


def left_in_a_pass(cluster):
    model = make_model("transformer-post")
    shard(model, cluster.device)
    if cluster.rank == 1:
        os._exit(0)
    loss_of(model, Batch.of([[5, 6]], [[7]]))[0].backward()


@pytest.mark.slow
def test_those_that_are_left_alone_in_a_pass_say_so_too(tmp_path):
    (tmp_path / "1").write_text("")
    first, _ = together(tmp_path, 2, left_in_a_pass)
    assert "RunError: process 0 of 2: another process of this training has ended" in first


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), left_alone(0, 2):
        raise RuntimeError("shapes do not fit")


def test_processes_that_gather_weights_all_part_an_update_alike():
    """What one of them has found too large, in a training before, must not make it gather more often than others."""
    model, batch = make_model("transformer-post"), Batch.of([[5, 6]] * 4, [[7]] * 4)
    for shares, parts in ((False, 4), (True, 1)):
        settings, standing = TrainConfig(shard=shares, accumulate=2), Standing(too_large=1)
        gradients = Gradients(model, settings, "float32", standing, print, Cluster(0, 2, CPU))
        assert len(list(gradients.parted(batch))) == parts


def test_one_process_alone_shares_nothing_and_says_so(corpus, tmp_path):
    run, said = Run.create(tmp_path / "run", make_config(corpus, shard=True)), []
    reporter = Reporter(run.config.train, quiet=True)
    reporter.say = said.append
    Trainer(run, prepare(run.config, run.folder), reporter, Cluster(0, 1, CPU)).resume()
    assert any("train.shard: this process is alone and holds all weights" in line for line in said)


def hold(cluster):
    """How many numbers of weights, gradients and optimizer this process holds, and how many there are."""
    torch.manual_seed(1)
    model = make_model("transformer-post")
    size = sum(each.numel() for each in model.parameters())
    shard(model, cluster.device)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = Batch.of([[5, 6]], [[7]])
    loss_of(model, batch)[0].backward()
    optimizer.step()
    held = [own(each) for each in model.parameters()]
    held += [own(each.grad) for each in model.parameters()]
    held += [own(value) for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return sum(each.numel() for each in held) / (4 * size)


@pytest.mark.slow
def test_each_process_holds_its_part(tmp_path):
    first, second = (float(share) for share in together(tmp_path, 2, hold))
    assert first + second == pytest.approx(1) and first == pytest.approx(0.5, abs=0.02)
