"""What every part may use: errors, files, processes; nothing of detection."""
