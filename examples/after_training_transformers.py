"""Fine-tune a ConvNeXt V2 of transformers, then export it and compare the artifact with the trained model."""

import torch
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

from exporter import export

labels = {0: "cat", 1: "dog", 2: "horse"}
config = ConvNextV2Config(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], id2label=labels)
model = ConvNextV2ForImageClassification(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for _ in range(2):
    images, classes = torch.randn(4, 3, 64, 64), torch.randint(3, (4,))
    model(images, labels=classes).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

built = export(model, "build")
print(built.artifact.path, built.artifact.sidecar.labels, f"cosine {built.report.value('cosine'):.6f}")
assert built.report.passed
