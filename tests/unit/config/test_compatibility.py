from __future__ import annotations

import pytest

from lockstep.config import Config
from lockstep.config.compatibility import FLAGS, SECTIONS, Status
from lockstep.config.config import HOME
from lockstep.config.parsing import parse_options
from lockstep.errors import OptionError

# slime v0.3.1, its flags and the Megatron flags of its scripts.
SLIME_FLAGS = """
actor-num-nodes actor-num-gpus-per-node rollout-num-gpus rollout-num-gpus-per-engine num-gpus-per-node colocate
offload offload-train offload-rollout distributed-backend distributed-timeout-minutes hf-checkpoint ref-load
ref-ckpt-step load save save-interval save-hf async-save no-save-optim model-name custom-model-provider-path
only-train-params-name-list freeze-params-name-list megatron-config-path custom-config-path rollout-function-path
custom-generate-function-path rollout-temperature rollout-top-p rollout-top-k rollout-max-response-len
rollout-max-prompt-len rollout-max-context-len rollout-stop rollout-stop-token-ids rollout-skip-special-tokens
rollout-shuffle rollout-seed rollout-batch-size n-samples-per-prompt global-batch-size num-steps-per-rollout
num-rollout num-epoch start-rollout-id over-sampling-batch-size dynamic-sampling-filter-path partial-rollout
mask-offpolicy-in-partial-rollout buffer-filter-path rollout-sample-hook-path rollout-sample-filter-path
rollout-all-samples-process-path rollout-data-postprocess-path rollout-external-engine-addrs rollout-data-transport
prompt-data input-key label-key metadata-key tool-key multimodal-keys apply-chat-template apply-chat-template-kwargs
data-source-path disable-rollout-global-dataset loss-mask-type data-pad-size-multiplier micro-batch-size
use-dynamic-batch-size max-tokens-per-gpu log-probs-max-tokens-per-gpu log-probs-chunk-size balance-data
balance-by-flops advantage-estimator loss-type eps-clip eps-clip-high eps-clip-c value-clip num-critic-only-steps
kl-coef use-kl-loss kl-loss-coef kl-loss-type use-unbiased-kl ref-update-interval entropy-coef gamma lambd
normalize-advantages disable-grpo-std-normalization disable-rewards-normalization calculate-per-token-loss
use-rollout-logprobs get-mismatch-metrics use-rollout-entropy use-tis tis-clip tis-clip-low custom-tis-function-path
use-opsm opsm-delta use-routing-replay use-rollout-routing-replay use-opd opd-type opd-kl-coef opd-teacher-load
enable-mtp-training mtp-num-layers mtp-loss-scaling-factor custom-loss-function-path custom-advantage-function-path
custom-pg-loss-reducer-function-path disable-compute-advantages-and-returns lr clip-grad seed weight-decay adam-beta1
adam-beta2 reset-optimizer-states use-stateless-adam rm-type rm-url custom-rm-path group-rm reward-key eval-reward-key
custom-reward-post-process-path custom-convert-samples-to-train-data-path eval-interval eval-prompt-data eval-config
skip-eval-before-train n-samples-per-eval-prompt eval-temperature eval-top-p eval-top-k eval-max-response-len
eval-max-prompt-len eval-max-context-len eval-min-new-tokens eval-input-key eval-label-key eval-tool-key
eval-function-path update-weight-mode update-weight-transport update-weight-disk-dir
update-weight-local-checkpoint-dir update-weight-delta-encoding update-weight-delta-checksum update-weight-buffer-size
update-weights-interval keep-old-actor release-train check-weight-update-equal sglang-config sglang-server-concurrency
sglang-router-ip sglang-router-port prefill-num-servers use-distributed-post http-proxy tensor-model-parallel-size
pipeline-model-parallel-size context-parallel-size expert-model-parallel-size expert-tensor-parallel-size
sequence-parallel recompute-granularity recompute-method recompute-num-layers optimizer lr-decay-style
optimizer-cpu-offload overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer attention-dropout hidden-dropout
accumulate-allreduce-grads-in-fp32 grad-reduce-in-bf16 attention-softmax-in-fp32 attention-backend
moe-token-dispatcher-type moe-enable-deepep decoder-last-pipeline-num-layers use-fault-tolerance
rollout-health-check-interval rollout-health-check-timeout rollout-health-check-first-wait use-wandb wandb-mode
wandb-dir wandb-key wandb-host wandb-team wandb-group wandb-project wandb-run-id disable-wandb-random-suffix
wandb-always-use-train-step use-tensorboard tb-project-name tb-experiment-name log-multi-turn log-passrate
log-reward-category log-correct-samples custom-rollout-log-function-path custom-eval-rollout-log-function-path
debug-rollout-only debug-train-only save-debug-rollout-data load-debug-rollout-data load-debug-rollout-data-subsample
load-forge-rollout-data save-debug-train-data dump-details profile-target memory-recorder ci-test
"""

FOREIGN = [entry for entry in FLAGS.values() if entry.name not in HOME]


def words_of(entry, value: str) -> list[str]:
    if entry.words == "none":
        return [entry.flag, value]
    return [entry.flag, value, value] if entry.words == "many" else [entry.flag, value]


def parse(*words: str) -> Config:
    return parse_options("train", ["--hf-checkpoint", "model", *words]).config


def test_every_slime_flag_is_classified():
    assert [name for name in SLIME_FLAGS.split() if name.replace("-", "_") not in FLAGS] == []


def test_no_flag_is_classified_twice():
    flags = [entry.flag for entries in SECTIONS.values() for entry in entries]
    assert sorted(flags) == sorted(set(flags))


def test_same_flags_are_options_and_only_limited_ones_are_refused():
    missing = [e.flag for e in FLAGS.values() if e.status is Status.SAME and e.name not in HOME]
    limited = [e.flag for e in FLAGS.values() if e.status is Status.SAME and e.works is not None]
    assert (missing, limited) == ([], [])


def test_every_decision_gives_its_reason_as_a_sentence():
    for entry in FLAGS.values():
        if entry.status is not Status.SAME:
            assert entry.note.endswith("."), entry.flag
        if entry.works is not None or entry.refused:
            assert entry.remedy.endswith("."), entry.flag
        if entry.status in (Status.LATER, Status.NEVER):
            assert entry.works is not None, entry.flag


@pytest.mark.parametrize("entry", [e for e in FOREIGN if e.works is None], ids=lambda e: e.flag)
def test_an_accepted_flag_changes_nothing(entry):
    assert entry.status is Status.ACCEPTED
    assert parse(*words_of(entry, "true" if entry.words == "none" else "7")) == parse()


LIMITED = [e for e in FLAGS.values() if e.works is not None]


@pytest.mark.parametrize("entry", LIMITED, ids=lambda e: e.flag)
def test_a_limited_flag_works_with_its_value_and_stops_with_another(entry):
    if entry.neutral is not None:
        assert parse(*words_of(entry, str(entry.neutral))) == parse()
    other = str(not entry.neutral) if entry.words == "none" else "7"
    with pytest.raises(OptionError) as caught:
        parse(*words_of(entry, other))
    assert (caught.value.field, caught.value.reason, caught.value.remedy) == (entry.flag, entry.note, entry.remedy)


@pytest.mark.parametrize(
    ("flag", "value"), [(e.flag, v) for e in FLAGS.values() for v in e.refused], ids=lambda part: str(part)
)
def test_a_refused_value_of_an_option_stops_with_what_to_use(flag, value):
    with pytest.raises(OptionError) as caught:
        parse(flag, value)
    assert (caught.value.field, caught.value.value) == (flag, value)
    assert caught.value.remedy.startswith("Use ")
