"""Fine-tune a ConvNeXt of torchvision, then export it and compare the artifact with the trained model."""

import torch
from torchvision.models import convnext_tiny

from exporter import export

model = convnext_tiny(num_classes=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
for _ in range(2):
    images, classes = torch.randn(4, 3, 64, 64), torch.randint(3, (4,))
    torch.nn.functional.cross_entropy(model(images), classes).backward()
    optimizer.step()
    optimizer.zero_grad()

built = export(model, "build", labels=["cat", "dog", "horse"])
print(built.artifact.path, f"cosine {built.report.value('cosine'):.6f}")
assert built.report.passed
