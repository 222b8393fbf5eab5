"""Distillation: a student learns a teacher's predictions; heads learn to guess ahead."""
