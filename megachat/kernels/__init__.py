"""The few operations worth a fast version, each beside its plain-torch reference; `choice` selects among them."""
