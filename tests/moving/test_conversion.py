"""From YAML to a configuration: what each field becomes, what is listed, and what is refused by file and line."""

import json

import pytest

from dataflex_jax.errors import InputError
from dataflex_jax.moving.conversion import converted
from dataflex_jax.policies.active import weighter_sections
from tests.helpers import moving
from tests.helpers.moving import DYNAMIC, SFT, configuration_of, sft


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with a components.yaml."""
    monkeypatch.chdir(tmp_path)
    moving.write_components(tmp_path)
    return tmp_path


def dynamic(folder, train_type, name, **fields):
    return sft(folder, **(DYNAMIC | {"train_type": train_type, "component_name": name} | fields))


def test_instruction_tuning_of_adapters(folder):
    recipe = sft(folder, devices=8, max_samples=1000, val_size=0.1, eval_strategy="steps", eval_steps=50, seed=7)
    assert len(recipe.text.splitlines()) < 40
    c = configuration_of(recipe)
    assert (c.seed, c.train_step, c.epochs, c.eval_every) == (7, None, 1.0, 50)
    assert (c.model.name_or_path, c.model.from_scratch, c.model.dtype) == ("Qwen/Qwen2.5-0.5B", False, "bfloat16")
    assert (c.lora.rank, c.lora.alpha, c.lora.target_modules) == (16, 8.0, ("all",))
    assert (c.data.source, c.data.root, c.data.domains) == ("dataset_info", "data", ("a", "b"))
    assert (c.data.template, c.data.cutoff_len, c.data.max_samples) == ("qwen", 1024, 1000)
    assert (c.data.batch_size, c.data.grad_accumulation, c.data.valid_fraction) == (2 * 4 * 8, 4, 0.1)
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.warmup_ratio) == (1e-4, "cosine", 0.1)
    assert (c.optim.weight_decay, c.optim.b2, c.optim.clip_norm) == (0.0, 0.999, 1.0)


def test_where_the_file_says_nothing_the_recipe_does_as_the_trainer_does(folder):
    least = {name: value for name, value in SFT.items() if name in ("model_name_or_path", "do_train", "dataset")}
    c = configuration_of(converted(moving.write(folder, least)))
    assert (c.epochs, c.lora.rank, c.lora.alpha, c.data.batch_size, c.data.cutoff_len) == (3.0, 8, None, 8, 2048)
    assert (c.optim.learning_rate, c.optim.schedule, c.optim.warmup_ratio) == (5e-5, "linear", 0.0)
    assert (c.model.dtype, c.data.valid_fraction, c.data.root) == ("float32", 0.0, "data")


def test_pretraining_of_all_parameters_reads_the_files_of_dataset_info(folder):
    (folder / "data").mkdir()
    columns = {"prompt": "content"}
    entries = {"a": {"file_name": "first.jsonl", "columns": columns}, "b": {"file_name": "b.json", "columns": columns}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(entries))
    c = configuration_of(sft(folder, stage="pt", finetuning_type="full", train_from_scratch=True))
    assert (c.lora.rank, c.model.from_scratch, c.data.tokenizer) == (0, True, "Qwen/Qwen2.5-0.5B")
    assert (c.data.source, c.data.domains, c.data.text_field) == ("local", ("first", "b"), "content")
    assert (c.data.seq_len, c.data.formatting) == (1024, None)
    with pytest.raises(InputError, match=r"run.yaml:9: dataset = 'a,c': .*dataset_info.json: 'c': no such entry"):
        sft(folder, stage="pt", dataset="a,c")


def test_the_recipe_takes_variants_in_place_of_its_policies(folder):
    recipe = dynamic(folder, "dynamic_select", "loss")
    assert configuration_of(recipe).selector.focus == "medium"
    other = configuration_of(recipe, "selector=random,weighter=loss")
    assert (other.selector.name, other.weighter.name) == ("random", "loss")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("less", {"proj_dim": 4096, "projection_seed": 123}),
        ("icons", {"proj_dim": 4096}),
        ("cluster_less", {"kmeans_iterations": 10, "representatives": "random", "cluster_seed": 42}),
        ("loss", {"focus": "medium", "quantiles": (0.33, 0.66)}),
        ("delta_loss", {"baseline": "warmup", "window_size": 0.2}),
        ("tsds", {}),
        ("near", {}),
        ("random", {}),
        ("coincide", {"num_clusters": 10000, "tau": 1.0, "cluster_seed": 42}),
    ],
)
def test_selectors(folder, name, expected):
    c = configuration_of(dynamic(folder, "dynamic_select", name, eval_dataset="t"))
    assert {field: c.selector[field] for field in expected} == expected
    assert (c.selector.name, c.warmup_step, c.update_step, c.update_times) == (name, 10, 20, 2)
    assert (c.train_step, c.epochs) == (50, None)
    assert (c.targets.domains == ("t",)) is (name not in ("loss", "delta_loss", "random", "coincide"))


def test_other_names_of_a_component_s_values(folder):
    params = "{clustering_method: lsh, representative_strategy: center_boundary}"
    (folder / "components.yaml").write_text(f"selectors: {{cluster_less: {{params: {params}}}}}")
    c = configuration_of(dynamic(folder, "dynamic_select", "cluster_less", eval_dataset="t"))
    assert (c.selector.clustering, c.selector.representatives) == ("random_projection_lsh", "mixed")
    assert (c.selector.samples_per_cluster, c.selector.kmeans_iterations) == (3, 20)  # the component's own defaults
    (folder / "components.yaml").write_text("weighters: {joint_update_aware: {params: {objective_mode: diverse_only}}}")
    assert configuration_of(dynamic(folder, "dynamic_weight", "joint_update_aware")).targets.source is None


def test_mixers(folder):
    odm = configuration_of(dynamic(folder, "dynamic_mix", "odm", init_mixture_proportions=[0.7, 0.3]))
    assert (odm.mixer.variant, odm.mixer.reward_scale, odm.mixer.warmup_step) == ("dataflex", 15.0, 2000)
    assert (odm.data.proportions, odm.train_step) == ((0.7, 0.3), 50)
    doremi = configuration_of(dynamic(folder, "dynamic_mix", "doremi"))
    assert (doremi.mixer.reference, doremi.mixer.eta, doremi.mixer.c) == ("ref", 0.1, 0.01)
    assert doremi.data.proportions == "uniform"
    random = configuration_of(dynamic(folder, "dynamic_mix", "random", update_times=-1, num_train_epochs=0.5))
    assert (random.mixer.name, random.train_step, random.epochs) == ("random", None, 0.5)


def test_static_mixing(folder):
    fixed = dynamic(folder, "dynamic_mix", "odm", static_mix=True, init_mixture_proportions=[0.7, 0.3], train_step=9)
    c = configuration_of(fixed)
    assert (c.mixer.name, c.data.proportions, c.train_step) == ("static", (0.7, 0.3), 9)
    c = configuration_of(dynamic(folder, "dynamic_mix", "static", mixture_sample_rule="mixture"))
    assert c.mixer.proportions == (0.5, 0.5)
    c = configuration_of(dynamic(folder, "dynamic_mix", "static", mixture_sample_rule="stratified", static_mix=True))
    assert c.data.proportions is None


def test_weighters(folder):
    c = configuration_of(dynamic(folder, "dynamic_weight", "adapt", eval_dataset="t", train_step=30))
    assert (c.weighter.normalize, c.weighter.tokens, c.train_step, c.warmup_step) == ("sum", "all", 30, 10)
    c = configuration_of(dynamic(folder, "dynamic_weight", "joint_update_aware", eval_dataset="t"))
    assert (c.weighter.pooling, c.weighter.iterations, c.epochs) == ("last", 5, 1.0)
    (folder / "components.yaml").write_text("weighters: {loss: {params: {strategy: uniform}}}")
    assert configuration_of(dynamic(folder, "dynamic_weight", "loss")).weighter.strategy == "linear"


@pytest.mark.parametrize(
    ("name", "policy", "expected"),
    [
        ("sorting", "sorting", {"scores": "field:quality", "polarity": "higher_later", "dynamic": False}),
        ("shuffle", "shuffle", {"dynamic": False}),
        ("segment", "segment", {"x_pct": 10.0, "front": "low", "back": "high"}),
        ("folding", "folding", {"L": 3}),
        ("zigzag", "zigzag", {"L": 3}),
        ("stair", "cross_guidance", {"sections": 2, "ratio": 0.225, "L": 3, "mode": "folding"}),
        ("saw", "cross_guidance", {"sections": 3, "ratio": 0.075, "L": 2, "mode": "zigzag"}),
        ("dynamic_saw", "cross_guidance", {"scores": "loss", "dynamic": True, "update_step": 60}),
    ],
)
def test_reorders(folder, name, policy, expected):
    c = configuration_of(dynamic(folder, "dynamic_reorder", name))
    assert c.order.name == policy
    assert {field: c.order[field] for field in expected} == expected


def test_a_pipeline_is_all_of_its_stages_each_with_its_schedule(folder):
    recipe = dynamic(folder, "dynamic_lego", "all_of_them", eval_dataset="t", train_step=100)
    c = configuration_of(recipe)
    assert (c.selector.name, c.mixer.name, c.order.name) == ("less", "random", "cross_guidance")
    assert (c.selector.warmup_step, c.selector.update_step, c.mixer.update_step) == (10, 20, 50)
    assert c.order.update_step is None  # it arranges each of the selector's choices
    sections = weighter_sections(c)
    assert {s.name: s.warmup_step for s in sections.values()} == {"loss": 10, "adapt": 0}
    assert "the target set of less, adapt" in "\n".join(map(str, recipe.notes))


def test_a_selector_that_filters_keeps_its_share(folder):
    c = configuration_of(dynamic(folder, "dynamic_lego", "hierarchical", train_step=100))
    assert (c.selector.name, c.selector.keep, c.selector.update_step, c.mixer.name) == ("loss", 0.5, 200, "odm")
    assert c.mixer.warmup_step == 2000  # the component's own, the longer of two
    c = configuration_of(dynamic(folder, "dynamic_lego", "select_only", train_step=100))
    assert c.selector.keep is None


def test_what_has_no_counterpart_is_listed_with_its_place_and_reason(folder):
    recipe = dynamic(folder, "dynamic_mix", "odm", template="qwen3_nothink")
    said = {str(note): note.matters for note in recipe.notes}
    assert f"{folder}/run.yaml:20: ddp_timeout: processes find each other by SLURM, Open MPI or --coordinator" in said
    places = {text.split(": ")[1]: matters for text, matters in said.items()}
    assert places["trust_remote_code"] is places["ddp_timeout"] is False
    assert places["template"] is places["component_name"] is places["warmup_steps"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loraa_rank": 8}, r":21: loraa_rank = 8: no field of .*; did you mean lora_rank\?"),
        ({"stage": "dpo"}, r":3: stage = 'dpo': accepted: sft, pt"),
        ({"do_train": False}, r":4: do_train = False: must be true"),
        ({"use_galore": True}, ":21: use_galore = True: another optimizer; here it is AdamW"),
        ({"quantization_bit": 4}, ":21: quantization_bit = 4: the weights are not quantised"),
        ({"neftune_noise_alpha": 5}, ":21: neftune_noise_alpha = 5: another training objective"),
        ({"optim": "adafactor"}, ":21: optim = 'adafactor': another optimizer"),
        ({"finetuning_type": "freeze"}, ":5: finetuning_type = 'freeze': name the parameters in config.model.train"),
        ({"lora_target": "all,embed_tokens"}, ":6: lora_target = .*: embed_tokens has no adapter here; accepted: all"),
        ({"lora_rank": "many"}, ":7: lora_rank = 'many': a whole number is expected"),
        ({"lora_rank": 2.5}, ":7: lora_rank = 2.5: a whole number is expected"),
        ({"dataset": ...}, ": dataset \\(not given\\): names of datasets are expected"),
        ({"dataset": {"a": 1}}, ":9: dataset = .*: names with commas between are expected"),
        ({"template": "vicuna"}, ":11: template = 'vicuna': accepted: qwen, llama3, mistral, alpaca, qwen3"),
        ({"val_size": 100}, ":21: val_size = 100: a share below 1 is expected"),
        ({"lr_scheduler_type": "polynomial"}, ":17: lr_scheduler_type = 'polynomial': accepted: linear"),
        ({"warmup_steps": 10}, ":21: warmup_steps = 10: with epochs the number of steps is not known yet"),
        ({"load_best_model_at_end": True}, ":21: load_best_model_at_end = True: the step that is best"),
        ({"export_dir": "x"}, ":21: export_dir = 'x': a file of `llamafactory-cli export`"),
        ({"disable_shuffling": True}, ":21: disable_shuffling = True: an order does that"),
        ({"train_type": "dynamic_merge"}, ":21: train_type = 'dynamic_merge': accepted: static, dynamic_select"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(folder, fields, message):
    with pytest.raises(InputError) as error:
        sft(folder, **fields)
    assert "\n" not in str(error.value)
    assert error.match(f"^{folder}/run.yaml{message}")


@pytest.mark.parametrize(
    ("train_type", "name", "fields", "message"),
    [
        ("dynamic_select", "custom", {}, "run.yaml:26: component_name = 'custom': a class of your own"),
        ("dynamic_select", "nothing", {}, "run.yaml:26: component_name = 'nothing': not among the selectors of "),
        (
            "dynamic_mix",
            "dynamic_moe",
            {},
            "run.yaml:26: component_name = 'dynamic_moe': not converted; configs",
        ),
        ("dynamic_select", "less", {}, r"run.yaml: eval_dataset \(not given\): less compares with it; name one"),
        ("dynamic_select", "loss", {"update_step": 0}, "run.yaml:23: update_step = 0: the steps between two updates"),
        ("dynamic_select", "loss", {"num_train_epochs": 3}, "run.yaml:16: num_train_epochs = 3: the 50 steps of the"),
        ("dynamic_select", "loss", {"train_step": 500}, "run.yaml:24: update_times = 2: the 50 steps would be repeat"),
        ("dynamic_select", "loss", {"max_steps": 7}, "run.yaml:27: max_steps = 7: the schedule of the data policy"),
        ("dynamic_mix", "odm", {"init_mixture_proportions": [1]}, "run.yaml:27: init_mixture_proportions = .1.: one"),
        ("dynamic_mix", "odm", {"mixture_sample_rule": "uniform"}, "run.yaml:27: mixture_sample_rule = .*: with it no"),
        ("dynamic_mix", "odm", {"dataset": "a,b,c"}, r"components.yaml:\d+: initial_proportions = .*: one for each of"),
        ("dynamic_reorder", "reuse_selector_scores", {}, r"components.yaml:\d+: score_source = .*: with a selector"),
        ("dynamic_select", "nice", {}, "run.yaml:26: component_name = 'nice': its rewards come from a model that vLLM"),
    ],
)
def test_components_that_have_no_counterpart_are_refused(folder, train_type, name, fields, message):
    with pytest.raises(InputError) as error:
        dynamic(folder, train_type, name, **fields)
    assert "\n" not in str(error.value)
    assert error.match(f"^(?:{folder}/)?{message}")


def test_of_deepspeed_s_file_what_is_not_auto_is_refused(folder):
    (folder / "z3.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}')
    assert not any(note.matters for note in sft(folder, deepspeed="z3.json").notes if note.place.name == "deepspeed")
    (note,) = (note for note in sft(folder, deepspeed="z2.json").notes if note.place.name == "deepspeed")
    assert note.matters
    assert note.reason.endswith("z2.json is not here, and was not read")
    (folder / "z3.json").write_text('{"gradient_clipping": 0.5}')
    with pytest.raises(InputError, match=r"run.yaml:21: deepspeed = 'z3.json': its gradient_clipping is 0.5; say"):
        sft(folder, deepspeed="z3.json")
    assert configuration_of(sft(folder, deepspeed="z3.json", max_grad_norm=0.5)).optim.clip_norm == 0.5
    (folder / "z3.json").write_text('{"optimizer": {"type": "Lion"}}')
    with pytest.raises(InputError, match=r"deepspeed = 'z3.json': it names the optimizer; here it"):
        sft(folder, deepspeed="z3.json")


def test_a_parameter_that_a_component_does_not_have_is_refused(folder):
    (folder / "components.yaml").write_text("mixers:\n  random:\n    params: {seeds: 1}\n")
    with pytest.raises(InputError, match=r"components.yaml:3: seeds = 1: no parameter of random; accepted: seed$"):
        dynamic(folder, "dynamic_mix", "random")


def test_paths_are_looked_for_in_the_working_directory_and_above_the_file(folder, monkeypatch):
    (folder / "examples").mkdir()
    (folder / "data").mkdir()
    path = moving.write(folder / "examples", SFT | DYNAMIC | {"train_type": "dynamic_select", "component_name": "loss"})
    assert configuration_of(converted(path)).data.root == "data"
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    c = configuration_of(converted(path))
    assert (c.data.root, c.selector.focus) == (str(folder / "data"), "medium")
