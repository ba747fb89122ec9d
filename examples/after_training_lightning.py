"""Train a LightningModule around a ConvNeXt of timm, then export it and compare the artifact with it."""

import lightning
import timm
import torch

from exporter import export


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("convnext_atto", num_classes=3)
        self.forward = self.model.forward

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


classifier, data = Classifier(), torch.utils.data.DataLoader([(torch.randn(3, 64, 64), 1)] * 2)
lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(classifier, data)
assert export(classifier, "build").report.passed
