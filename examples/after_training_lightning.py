"""Train a LightningModule around a ConvNeXt of timm, then export it and compare the artifact with it."""

import lightning
import timm
import torch

from exporter import export


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("convnext_atto", num_classes=3)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


classifier = Classifier()
data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.randint(3, (8,)))
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(classifier, torch.utils.data.DataLoader(data, batch_size=4))
assert export(classifier, "build").report.passed
