"""Programs that run inside the peers' own environments; nothing of fastgen is imported there."""
