"""What leaves this machine and comes back: bundles, exported models, Google Drive, checkpoint files, old files."""
