"""Letters to sounds with PyTorch Lightning: the task of train_g2p.py with a Trainer in place of a loop.

    pip install -e '.[examples,lightning]'
    python examples/lightning_g2p.py
    tensorboard --logdir runs/lightning_g2p

Training stops after `--epochs` passes, or earlier if the phone error rate (PER) of the development words has not fallen
for three passes. The checkpoint with the lowest rate is then scored on held-out words. A second run with the same seed
gives the same numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import train_g2p
from example_utils import packages_of, positive_int, quick_option
from torch import Tensor
from torch.utils.data import DataLoader
from train_g2p import Examples

from fused_attn.backends.dispatch import BACKEND_NAMES
from fused_attn.nn.seq2seq import Seq2SeqTransformer

with packages_of("examples,lightning"):
    import lightning
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger


class Pronunciations(lightning.LightningDataModule):
    """The CMU Pronouncing Dictionary.

    Args:
        num_words: the number of training words, which are drawn at random from all of them.
        num_test: the number of held-out words for the result.
        seed: of the draw, and of the order of the batches.
    """

    def __init__(self, num_words: int = 10000, num_test: int = 1000, seed: int = 0):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.dictionary = train_g2p.load_dictionary()
        words, self.dev_words, self.test_words = train_g2p.split(self.dictionary, self.hparams.num_test)
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(self.hparams.seed))
        self.train = Examples.of([words[n] for n in order[: self.hparams.num_words]], self.dictionary)
        self.dev = Examples.of(self.dev_words, self.dictionary)

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch
        return self._loader(self.train, train_g2p.batches(self.train, seed=self.hparams.seed + 1000 * epoch))

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.dev, torch.arange(len(self.dev.src)).split(train_g2p.BATCH_SIZE))

    @staticmethod
    def _loader(examples: Examples, batches: list[Tensor]) -> DataLoader:
        def collate(rows: list[int]) -> Examples:
            return examples.select(torch.tensor(rows))

        return DataLoader(range(len(examples.src)), batch_sampler=batches, collate_fn=collate)


class Pronouncer(lightning.LightningModule):
    """A `Seq2SeqTransformer` that maps letters to phones.

    Args:
        model: the sizes, with the names of `train_g2p.MODEL`.
        backend: of `fused_attention`; None lets it choose.
    """

    def __init__(self, model: dict, peak_learning_rate: float = 3e-3, backend: str | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.model = Seq2SeqTransformer(
            train_g2p.PAD + 1 + len(train_g2p.LETTERS),
            train_g2p.EOS + 1 + len(train_g2p.PHONES),
            **model,
            pad_id=train_g2p.PAD,
            sos_id=train_g2p.SOS,
            eos_id=train_g2p.EOS,
            backend=backend,
        )

    def training_step(self, batch: Examples, _) -> Tensor:
        loss = train_g2p.loss_of(self.model, batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.src))
        return loss

    def validation_step(self, batch: Examples, _) -> None:
        self.log("val_loss", train_g2p.loss_of(self.model, batch), prog_bar=True, batch_size=len(batch.src))

    def on_validation_epoch_end(self) -> None:
        data = self.trainer.datamodule
        self.log("val_per", train_g2p.evaluate(self.model, data.dev_words, data.dictionary).per, prog_bar=True)

    def configure_optimizers(self) -> dict:
        rate = self.hparams.peak_learning_rate
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, anneal_strategy="linear")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the script, and returns the metrics of the best checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=positive_int, default=8, help="passes over the words, at most (%(default)s)")
    parser.add_argument("--words", type=positive_int, default=10000, help="training words (%(default)s)")
    parser.add_argument("--test-words", type=positive_int, default=1000, help="held-out words (%(default)s)")
    parser.add_argument("--backend", choices=BACKEND_NAMES, help="attention backend (the fastest that can run)")
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu, ... (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (%(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/lightning_g2p"), help="folder for the results (%(default)s)"
    )
    parser.add_argument("--quick", **quick_option(epochs=1, words=1000, test_words=100))
    args = parser.parse_args(argv)

    lightning.seed_everything(args.seed, workers=True)
    data = Pronunciations(args.words, args.test_words, args.seed)
    best = ModelCheckpoint(monitor="val_per", mode="min", save_last=True)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        deterministic=True,
        gradient_clip_val=train_g2p.MAX_GRADIENT_NORM,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[EarlyStopping("val_per", mode="min", patience=3), best],
        logger=TensorBoardLogger(args.output, name=None),
        log_every_n_steps=10,
    )
    trainer.fit(Pronouncer(train_g2p.MODEL, train_g2p.PEAK_LEARNING_RATE, args.backend), datamodule=data)

    model = Pronouncer.load_from_checkpoint(best.best_model_path).model.to(trainer.strategy.root_device)
    score = train_g2p.evaluate(model, data.test_words, data.dictionary)
    metrics = {"val_per": best.best_model_score.item(), "test_per": score.per, "test_words": score.word_accuracy}
    print(f"PER {score.per:.2%}, words right {score.word_accuracy:.1%} of {len(data.test_words)} held-out words")
    print(f"checkpoint: {best.best_model_path}, curves: tensorboard --logdir {args.output}")
    return metrics


if __name__ == "__main__":
    main()
