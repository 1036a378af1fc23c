"""Learned rounding predicts more as the raw model does, in a file that still fits; gradients are straight through."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pgolf_core.artifact.format import pack, read_model
from pgolf_core.batches import CPU, TokenStream
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.export import export, load, quantize_state
from pgolf_core.export_inputs import calibration_of, teacher_of
from pgolf_core.model import GPT
from pgolf_core.quantization.allocation import solve
from pgolf_core.quantization.calibration import calibrate
from pgolf_core.quantization.learning import Student, Teacher
from pgolf_core.quantization.primitives import RankOne
from pgolf_core.scheme import ExportError
from pgolf_core.shards import shard_paths
from pgolf_core.train import make_state, train_step

SMALL = dict(vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1)
STEPS = 24


def config_of(**knobs):
    solved = dict(allocation="solve", codec="zlib", cap_bytes=4_500, learn_steps=STEPS, learn_rate=0.03)
    return RunConfig(**SMALL | solved | knobs).export


def file_bytes(quantized) -> int:
    return len(pack(quantized, "zlib").bytes)  # zlib packs tiny models faster than "ans"


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = GPT(RunConfig(**SMALL).model)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and p.size(0) > 2:
                p.normal_(std=0.2)
    return Teacher(model, [torch.randint(64, (4, 32)) for _ in range(STEPS)])


@pytest.fixture(scope="module")
def parts(teacher):
    calibration = calibrate(teacher.model, teacher.text[:8])
    state = {name: p.detach() for name, p in teacher.model.state_dict().items()}
    weights = {name: state[name] for name in calibration}
    return weights, {name: p.half() for name, p in state.items() if name not in calibration}, calibration


@pytest.fixture(scope="module")
def solved(parts):
    return solve(*parts, config_of(), file_bytes)


def divergence(teacher, quantized, texts) -> float:
    """Independently of the learner: F.kl_div of a model that holds the stored weights."""
    read = copy.deepcopy(teacher.model)
    read.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        pairs = [(read(ids).log_softmax(-1), teacher.model(ids).log_softmax(-1)) for ids in texts]
    return sum(F.kl_div(*pair, log_target=True, reduction="sum").item() for pair in pairs)


def test_learned_levels_predict_more_as_the_raw_model_on_other_text_too_in_a_file_that_fits(teacher, solved):
    before = {name: p.clone() for name, p in teacher.model.state_dict().items()}
    learned = teacher.learn(solved, config_of(), file_bytes)
    unseen = [torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(9))]
    assert divergence(teacher, learned, unseen) < 0.75 * divergence(teacher, solved, unseen)
    assert file_bytes(learned) <= 4_500
    assert all(torch.equal(p, before[name]) for name, p in teacher.model.state_dict().items())
    ratios = [t.step_size() / solved.tensors[name].step_size() for name, t in learned.tensors.items()]
    torch.testing.assert_close(torch.cat([r.flatten() for r in ratios]).std(), torch.tensor(0.0), rtol=0, atol=2e-3)
    assert any(not torch.equal(t, solved.floats[name]) for name, t in learned.floats.items())
    assert {name: t.dtype for name, t in learned.floats.items()} == {n: t.dtype for n, t in solved.floats.items()}


def test_a_residual_stays_and_is_part_of_what_is_learned_around(teacher, solved):
    name = "blocks.0.mlp.fc.weight"
    pair = RankOne(torch.linspace(-1, 1, 64).half(), torch.linspace(0.1, 0.2, 32).half())
    with_residual = replace(solved, residuals={name: pair})
    student = Student(teacher.model, with_residual)
    student.round()
    read = with_residual.state_dict()
    assert all(torch.equal(p, read[name]) for name, p in student.parameters.items())
    learned = teacher.learn(with_residual, config_of(cap_bytes=6_000), file_bytes)
    assert divergence(teacher, learned, teacher.text[:4]) < divergence(teacher, with_residual, teacher.text[:4])
    assert learned.residuals == {name: pair}


def test_the_student_begins_as_the_solvers_model(teacher, solved):
    student = Student(teacher.model, solved)
    assert all(torch.equal(student.levels(name), t.q.float()) for name, t in solved.tensors.items())
    assert all(torch.equal(t.q, solved.tensors[name].q) for name, t in student.stored().tensors.items())


def test_gradients_of_rounded_weights_become_those_of_the_latents_times_the_step(teacher, solved):
    student, ids = Student(teacher.model, solved), teacher.text[0]
    teacher.add_gradients(student, 0, labels=0.0)
    rounded = copy.deepcopy(teacher.model)
    rounded.load_state_dict(solved.state_dict())
    with torch.no_grad():
        expected = teacher.model(ids).log_softmax(-1)
    F.kl_div(rounded(ids).log_softmax(-1), expected, log_target=True, reduction="sum").div(ids.numel()).backward()
    for name, p in rounded.named_parameters():
        grad = student.latents[name].grad if name in student.latents else student.floats[name].grad
        step = student.steps.get(name, 1.0)
        torch.testing.assert_close(grad, p.grad * step, rtol=1e-3, atol=1e-7)


def test_coarser_steps_store_the_same_weights_in_fewer_bytes(teacher, solved):
    student = Student(teacher.model, solved)
    student.rescale(1.25)
    for name, tensor in student.stored().tensors.items():
        step, exact = tensor.step_size(), student.latents[name] * solved.tensors[name].step_size()
        torch.testing.assert_close(step, 1.25 * solved.tensors[name].step_size(), rtol=1e-3, atol=0)  # float16
        assert ((tensor.q * step - exact).abs() <= 0.51 * step + 1e-3 * exact.abs()).all()
    assert file_bytes(student.stored()) < file_bytes(solved)


@pytest.mark.parametrize("cap", [3_500, 4_300, 4_700, 4_900])
def test_steps_are_made_as_fine_as_the_cap_allows(teacher, solved, cap):
    student = Student(teacher.model, solved)
    for name, w in teacher.model.named_parameters():
        if name in student.latents:  # many begin together at the margin
            student.latents[name] = w.detach() / student.steps[name]
    student.fit_to(cap, file_bytes)
    assert 0.99 * cap <= file_bytes(student.stored()) <= cap


@pytest.mark.slow
def test_a_nano_file_trained_for_its_bytes_takes_99_to_100_percent_of_any_cap(few_documents, tmp_path):
    knobs = dict(track="nano", iterations=20, data_path=str(few_documents), calibration_tokens=4096, muon_wd=0.6)
    learning = dict(allocation="solve", codec="ans", learn_steps=16, learn_tokens=1024, learn_rate=0.01)
    config, shards = RunConfig(**knobs, **learning, learn_labels=0.7), shard_paths(few_documents, "train")
    state = make_state(config, TokenStream(shards))
    for step in range(20):
        train_step(state, min(1.0, (20 - step) / 10))
    weights = {name: p.detach() for name, p in state.model.state_dict().items()}
    calibration = calibration_of(weights, config, shards, CPU)
    for cap in (40_000, 60_000, 100_000, 160_000, 240_000):
        own = config.with_knobs(cap_bytes=cap)
        learner = teacher_of(weights, own, shards, CPU)
        account = export(weights, own.export, tmp_path / "a", calibration, teacher=learner, code_bytes=17_000)
        assert 0.99 * cap <= account.total == 17_000 + (tmp_path / "a").stat().st_size <= cap


def test_where_the_finest_steps_leave_the_cap_free_they_stay(teacher, parts):
    config = config_of(cap_bytes=60_000, learn_labels=0.7)
    finest = solve(*parts, config, file_bytes)
    learned = Teacher(teacher.model, teacher.text[:4]).learn(finest, config, file_bytes)
    assert file_bytes(finest) < 40_000
    for name, tensor in learned.tensors.items():
        assert torch.equal(tensor.step_size(), finest.tensors[name].step_size())


def test_levels_of_a_fixed_quantizer_that_would_not_fit_are_not_kept(teacher, tmp_path):
    config = config_of(allocation="fixed", quantizer="ternary", keep_float_max_numel=0, learn_labels=0.7)
    state = teacher.model.state_dict()
    plain = export(state, config.model_copy(update=dict(learn_steps=0)), tmp_path / "plain")
    tight = config.model_copy(update=dict(cap_bytes=plain.total))
    with pytest.warns(UserWarning, match="found no levels of fewer bytes, so those before are kept"):
        account = export(state, tight, tmp_path / "tight", teacher=teacher)
    assert account.fits and (tmp_path / "tight").read_bytes() == (tmp_path / "plain").read_bytes()


def test_labels_alone_make_the_loss_that_of_the_text(teacher, solved):
    student, ids = Student(teacher.model, solved), teacher.text[0]
    few = Teacher(teacher.model, [ids])
    with torch.no_grad():
        student.round()
        expected = F.cross_entropy(student.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert few.loss(student, 1.0) == pytest.approx(expected.item(), rel=1e-5)


def test_with_half_labels_every_other_batch_follows_the_raw_model(teacher, solved):
    student, pair = Student(teacher.model, solved), teacher.text[:2]
    text, raw = Teacher(teacher.model, pair[:1]).loss(student, 1.0), Teacher(teacher.model, pair[1:]).loss(student, 0.0)
    assert Teacher(teacher.model, pair).loss(student, 0.5) == pytest.approx((text + raw) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "taught"), [(0.0, STEPS), (0.7, round(0.3 * STEPS)), (0.9, round(0.1 * STEPS)), (1.0, 0)]
)
def test_the_raw_model_predicts_its_share_of_the_batches_alone(teacher, solved, labels, taught):
    student, seen = Student(teacher.model, solved), []
    with teacher.model.tok_emb.register_forward_hook(lambda module, ids, output: seen.append(len(ids[0]))):
        for step in range(STEPS):
            teacher.add_gradients(student, step, labels)
    assert sum(seen) == 4 * taught


def test_learning_works_where_the_caller_wants_no_gradients(teacher, parts):
    solved = solve(*parts, config_of(cap_bytes=9_000), file_bytes)  # at coarser levels all queries may be zero
    with torch.no_grad():
        short = Teacher(teacher.model, teacher.text[:2])
        short.add_gradients(student := Student(teacher.model, solved), 0, labels=0.5)
    assert all(latent.grad.any() for latent in student.latents.values())


def test_where_learning_finds_nothing_better_the_solvers_model_is_kept_with_a_warning(teacher, solved):
    with pytest.warns(UserWarning, match="learn_rate=50: 4 steps found no better levels, so those before are kept"):
        assert Teacher(teacher.model, teacher.text[:4]).learn(solved, config_of(learn_rate=50), file_bytes) is solved


def test_equal_inputs_give_equal_files_and_the_file_holds_what_was_learned(teacher, parts, tmp_path):
    weights, _, calibration = parts
    state, config = teacher.model.state_dict(), config_of(cap_bytes=4_700)
    teacher = Teacher(teacher.model, teacher.text[:16])
    for name in ("a", "b"):
        account = export(state, config, tmp_path / name, calibration, teacher=teacher)
        assert account.fits
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    export(state, config.model_copy(update=dict(learn_steps=0)), tmp_path / "plain", calibration)
    read, plain = load(tmp_path / "a"), load(tmp_path / "plain")
    assert any(not torch.equal(read[name], plain[name]) for name in weights)


@pytest.mark.parametrize("quantizer", ["ternary", "binary", "sdclip:3:6", "absmax:4", "step:1"])
def test_every_grid_learns_and_stays_within_its_levels(quantizer, teacher, parts, tmp_path):
    weights, _, _ = parts
    config = config_of(allocation="fixed", quantizer=quantizer, keep_float_max_numel=0, learn_steps=8, cap_bytes=60_000)
    state, few = teacher.model.state_dict(), Teacher(teacher.model, teacher.text[:8])
    plain = quantize_state(state, config)
    export(state, config, tmp_path / "a", teacher=few)
    learned = read_model(tmp_path / "a")
    assert divergence(teacher, learned, teacher.text[:8]) < divergence(teacher, plain, teacher.text[:8])
    for name in weights:
        ours, theirs = learned.tensors[name], plain.tensors[name]
        assert ours.q.abs().max() <= theirs.q.abs().max() or quantizer == "step:1"  # nothing is clipped there
        assert torch.equal(ours.step_size(), theirs.step_size())
        assert quantizer != "binary" or ((ours.q.abs() == 1).all() and not torch.equal(ours.q, theirs.q))


def test_a_codebook_has_no_levels_to_learn(teacher, tmp_path):
    fixed = dict(allocation="fixed", keep_float_max_numel=0)
    with pytest.raises(ConfigError, match=r"learn_steps=.* learns levels, and a codebook has none"):
        config_of(**fixed, quantizer="codebook:16:2")
    config = config_of(**fixed).model_copy(update=dict(quantizer="codebook:16:2"))  # as a user's scheme might be
    with pytest.raises(ExportError, match=r"learn_steps learns levels, and tensor .* has none"):
        export(teacher.model.state_dict(), config, tmp_path / "a", teacher=teacher)
    assert not (tmp_path / "a").exists()


def test_learning_without_a_model_and_text_is_refused(parts, tmp_path):
    state = parts[0] | parts[1]
    with pytest.raises(ExportError, match="learn_steps=24 needs the model and training text"):
        export(state, config_of(), tmp_path / "a", parts[2])
    assert not (tmp_path / "a").exists()
