"""One process; mirrors megachat/."""
