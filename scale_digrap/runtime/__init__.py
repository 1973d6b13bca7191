"""What every room uses: text and files from outside, secrets, files written whole. Imports nothing of ours but errors."""
