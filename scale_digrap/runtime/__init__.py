"""What every room uses: text and files from outside, secrets, whole writes. Imports nothing of ours but errors."""
