"""Trains by TRL as `benchmarks.alternate` says: `python -m benchmarks.trl_worker '{...}'`.

The data come as token ids, so that TRL trains on the very same ones. Its own collators, losses, optimizer and loop run;
they are held up only between two updates, where the driver says whose turn it is.

Packing of SFT (strategy "bfd") makes TRL flatten a micro-batch into one row without padding. On the CPU, with "sdpa"
attention, transformers makes a dense mask from the positions, which begin anew with every sequence: the sequences do
not see each other, but attention is computed over the whole row. The check of the loss says if that ceases to hold.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks import pairs
from benchmarks.channel import Channel, peak_bytes

WARM_UP_PAIRS = 2  # of the reference pass


class Counted:
    """Counts what goes through the training step of a trainer."""

    counts: dict

    def training_step(self, model, inputs, *arguments, **options):
        tokens = inputs["input_ids"]
        if "attention_mask" in inputs:
            sequences, real = len(tokens), int(inputs["attention_mask"].sum())
        else:  # packed
            sequences, real = int((inputs["position_ids"] == 0).sum()), tokens.numel()
        done = dict(units=sequences // self.sequences_per_unit, computed=tokens.numel(), real=real)
        self.counts = {name: self.counts.get(name, 0) + count for name, count in done.items()}
        return super().training_step(model, inputs, *arguments, **options)


class CountedDPO(Counted, DPOTrainer):
    sequences_per_unit = 2
    reference = None

    def _prepare_dataset(self, dataset, *arguments, **options):
        return dataset  # in token ids already

    def _precompute_ref_logps(self, dataset, name, batch_size):
        super()._precompute_ref_logps(dataset.select(range(min(WARM_UP_PAIRS, len(dataset)))), name, batch_size)
        start = time.perf_counter()
        computed = super()._precompute_ref_logps(dataset, name, batch_size)
        seconds = time.perf_counter() - start
        self.reference = dict(seconds_per_unit=seconds / len(dataset), units=len(dataset))
        return computed


class CountedSFT(Counted, SFTTrainer):
    sequences_per_unit = 1
    reference = None


class Turns(TrainerCallback):
    """Holds the training up between two updates until the driver says go."""

    def __init__(self, channel: Channel, warm_up: int, ready: dict):
        self._channel, self._warm_up, self._ready = channel, warm_up, ready
        self.trainer = None
        self._steps, self._left, self._start = 0, 0, 0.0

    def on_step_end(self, args, state, control, **options):
        if state.global_step < self._warm_up:
            return
        if state.global_step == self._warm_up:
            self._channel.send(**self._ready)
            self._next(control)
            return
        self._left -= 1
        if not self._left:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._channel.send(seconds=time.perf_counter() - self._start, **self.trainer.counts)
            self._next(control)

    def _next(self, control) -> None:
        self._left = self._channel.steps_asked()
        control.should_training_stop = not self._left
        self.trainer.counts = {}
        self._start = time.perf_counter()


def make_trainer(settings: dict, folder: str, turns: Turns):
    """The trainer, and the first units of the data for the check."""
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    units = pairs.read_units(settings["data"])
    options = dict(
        output_dir=folder,
        per_device_train_batch_size=settings["per_device"],
        gradient_accumulation_steps=settings["accumulate"],
        max_steps=10**6,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=pairs.LONGEST,
        bf16=settings["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    shared = dict(model=model, processing_class=tokenizer, callbacks=[turns])
    data = Dataset.from_list(units)
    if settings["objective"] == "sft":
        config = SFTConfig(packing=settings["packing"], **options)
        return CountedSFT(args=config, train_dataset=data, **shared), units
    config = DPOConfig(beta=settings["beta"], precompute_ref_log_probs=settings["precompute"], **options)
    if not settings["precompute"]:
        return CountedDPO(args=config, train_dataset=data, **shared), units
    # The pairs whose reference is computed are those that are trained on, since a made-up one makes gradients denormal.
    data = data.select(range(min(settings["reference_units"], len(data))))
    trainer = CountedDPO(args=config, train_dataset=data, **shared)
    return trainer, units


def check(trainer, settings: dict, units: list[dict]) -> dict:
    """Of the first units, before any update: loss and gradient norm, and for DPO the policy's margins."""
    found = {}
    trainer.counts = {}
    model = trainer.model.train()

    def collated(chosen: list[dict]) -> dict:
        return trainer._prepare_inputs(trainer.data_collator(chosen))  # on the model's device

    if settings["objective"] == "dpo":
        inputs = collated(units)
        chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
        if settings["precompute"]:
            inputs |= dict(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
        found["margins"] = (chosen - rejected).tolist()
    elif settings["packing"]:
        packed = {name: [each for unit in units for each in unit[name]] for name in ("input_ids", "labels")}
        lengths = [len(unit["input_ids"]) for unit in units]
        inputs = collated([packed | dict(seq_lengths=lengths)])
        found["packed_beside_alone"] = packed_beside_alone(trainer, inputs, units)
    else:
        inputs = collated(units)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    found["gradient_norm"] = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    model.zero_grad()
    trainer._metrics["train"].clear()
    return found | dict(loss=loss.item())


@torch.no_grad()
def packed_beside_alone(trainer, inputs: dict, units: list[dict]) -> float:
    """How far the loss of packed sequences is from that of the same ones alone: 0 where they do not see each other."""
    tokens = [sum(label != -100 for label in unit["labels"]) for unit in units]
    packed = trainer.compute_loss(trainer.model, dict(inputs)).item()
    collated = [trainer._prepare_inputs(trainer.data_collator([unit])) for unit in units]
    alone = [trainer.compute_loss(trainer.model, each).item() for each in collated]
    return packed - sum(loss * count for loss, count in zip(alone, tokens, strict=True)) / sum(tokens)


def main():
    channel = Channel()
    settings = json.loads(sys.argv[1])
    ready: dict = {}
    turns = Turns(channel, settings["warm_up"], ready)
    with tempfile.TemporaryDirectory() as folder:
        trainer, units = make_trainer(settings, folder, turns)
        turns.trainer = trainer
        ready |= dict(
            check=check(trainer, settings, units[: settings["checked_units"]]),
            reference=trainer.reference,
            attention=trainer.model.config._attn_implementation,
        )
        trainer.train()
    channel.send(peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes())


if __name__ == "__main__":
    main()
