# SPDX-License-Identifier: Apache-2.0
"""SmoothRot INT4 for vLLM: the checkpoint format, the ops and the plugin."""
