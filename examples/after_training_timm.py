"""Fine-tune a ConvNeXt of timm, then export it and compare the artifact with the trained model."""

import timm
import torch

from exporter import export

model = timm.create_model("convnext_atto", num_classes=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for _ in range(2):
    images, classes = torch.randn(4, 3, 64, 64), torch.randint(3, (4,))
    torch.nn.functional.cross_entropy(model(images), classes).backward()
    optimizer.step()
    optimizer.zero_grad()

built = export(model, "build", labels=["cat", "dog", "horse"])
print(built.artifact.path, f"cosine {built.report.value('cosine'):.6f}")
assert built.report.passed
