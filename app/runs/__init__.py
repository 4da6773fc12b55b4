"""What a run leaves on disk and how a stopped one continues: folders, checkpoints, identity, summary."""
