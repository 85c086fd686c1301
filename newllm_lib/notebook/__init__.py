"""What a notebook adds: the panel of settings, Google Drive and downloads."""
