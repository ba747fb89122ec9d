"""ConvNeXt in PyTorch: the network, the table of variants, weights, and the forms it is written in."""

FORMS = ("plain", "linear", "conv", "nchw")  # `forms` says what each is, and imports torch
