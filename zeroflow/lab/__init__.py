"""The ZeRO laboratory: each stage's memory, communication, speed and losses, predicted and
measured."""
