"""Small logs in the shapes that trainers write; every figure in them is invented."""

REFERENCE = """\
W0101 00:00:00.000000 1 torch/distributed/run.py:852] Setting OMP_NUM_THREADS environment variable: why not
logs/some-run.txt
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/words_1024.model
train_loader:dataset:words10B train_shards:3
val_loader:shards pattern=./data/words_val_*.bin tokens:99328
model_params:1234567 (unique_layers:9 loops:1)
world_size:8 grad_accum_steps:1
sdp_backends:cudnn=False flash=True
attention_mode:gqa num_heads:8 num_kv_heads:4
tie_embeddings:True embed_lr:0.05 head_lr:0.0
quantizer:using default int8 for all
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:2 max_wallclock_seconds:600.000
seed:1337
warmup_step:1/2
warmup_step:2/2
step:0/20000 val_loss:6.9000 val_bpb:4.1000 train_time:0ms step_avg:0.01ms
step:1/20000 train_loss:6.9100 train_time:44ms step_avg:44.00ms
step:6800/20000 train_loss:2.1000 train_time:598000ms step_avg:87.94ms
step:6821/20000 val_loss:2.0500 val_bpb:1.2200 train_time:600012ms step_avg:87.97ms
stopping_early: wallclock_cap train_time:600012ms step:6821/20000
peak memory allocated: 10000 MiB reserved: 10200 MiB
Serialized model: 67000000 bytes
Code size: 50000 bytes
Total submission size: 67050000 bytes
Serialized model int8+zlib: 15700000 bytes (payload:17000000 raw_torch:17100000 payload_ratio:3.91x)
Total submission size int8+zlib: 15750000 bytes
final_int8_zlib_roundtrip val_loss:2.0612 val_bpb:1.2346 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.06123456 val_bpb:1.23456780
"""

SOURCE = '''\
"""
Prints lines like
final_int8_zlib_roundtrip_exact val_loss:1.00000000 val_bpb:0.50000000
"""
import os

class Hyperparameters:
    seed: int = 7

def main():
    log0(f"seed:{args.seed}")
    text = """
step:1/3 val_loss:1.0000 val_bpb:0.5000
Total submission size int8+zlib: 17 bytes
"""

'''

MACHINE = f"""\
{"=" * 100}
Running Python 3.12.1 (main) [GCC 11.4.0]
Running PyTorch 2.11.0+cu130
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |
{"=" * 100}
"""

TUNED = """\
Hyperparameters:
  artifact_dir:
  compressor: brotli
  embed_lr: 0.6
  eval_stride: 64
  iterations: 20000
  logfile: logs/tuned_s{seed}.txt
  run_id: tuned_s{seed}
  seed: {seed}
  sliding_window_enabled: False
  tie_embeddings: True
  tokenizer_path: ./data/tokenizers/words_8192.model
  train_batch_tokens: 786432
  ttt_enabled: True
  vocab_size: 8192
train_shards: 128
val_tokens: 40960
model_params:36000000
gptq:reserving 4s, effective=596000ms
warmup_step: 1/20
0/20000 val_loss: 9.0000 val_bpb: 3.4800
1/20000 train_loss: 9.0100 train_time: 0.0m tok/s: 16000000
4500/20000 train_loss: 2.8400 train_time: 9.0m tok/s: 6500000
layer_loop:enabled step:2100 frac:0.350 encoder:[0, 1] decoder:[1, 0]
4800/20000 val_loss: 2.7700 val_bpb: 1.0730
stopping_early: wallclock_cap train_time: 587500ms step: 4800/20000
ema:applying EMA weights
diagnostic pre-quantization post-ema val_loss:2.76000000 val_bpb:1.07100000 eval_time:6400ms
Serialized model: 135000000 bytes
Code size (uncompressed): 140000 bytes
Code size (compressed): 28000 bytes
Serialized model quantized+brotli: 15900000 bytes
Total submission size quantized+brotli: 15928000 bytes
diagnostic quantized val_loss:2.79000000 val_bpb:1.08300000 eval_time:55800ms
beginning TTT eval timer
ttt_phased: total_docs:50000 prefix_docs:2000 boundaries:[666, 2000]
ttp: b7/9 bl:2.7 bb:1.1 rl:2.7 rb:1.1 dl:7000-8000 gd:0
quantized_ttt_phased val_loss:2.75000000 val_bpb:1.07234560 eval_time:500200ms
total_eval_time:500.2s
"""

SLIDING = """\
tokenizer_path=./words_1024.model
val_loader:shards pattern=./words_val_*.bin tokens:99328
seed:42
step:7000/9000 train_loss:1.9000 train_time:590000ms step_avg:84.28ms
step:7150/9000 val_loss:1.9111 val_bpb:1.1322 train_time:600200ms step_avg:83.94ms
DIAGNOSTIC post_ema val_loss:1.9100 val_bpb:1.1311 eval_time:2000ms
Serialized model: 106000000 bytes
Code size: 90000 bytes
Serialized model int6+lzma: 15700000 bytes
Total submission size int6+lzma: 15790000 bytes
final_int6_roundtrip val_loss:1.9333 val_bpb:1.1444 eval_time:20500ms
final_int6_roundtrip_exact val_loss:1.93331111 val_bpb:1.14441111
final_int6_sliding_window val_loss:1.8933 val_bpb:1.1211 stride:64 eval_time:97500ms
final_int6_sliding_window_exact val_loss:1.89331111 val_bpb:1.12111111
final_int8_zlib_roundtrip_exact val_loss:1.89331111 val_bpb:1.12111111
"""

LEGAL_TTT = """\
ttt_sliding:start chunks=190 chunk_tokens=32768 stride=64 ttt_lr=0.002
  ttt_chunk [1/190] bpb=1.17 time=0.5s
ttt_sliding:done val_loss=1.877708 val_bpb=1.112111 elapsed=400.1s
legal_ttt val_loss:1.8777 val_bpb:1.1121 eval_time:400500ms
legal_ttt_exact val_loss:1.87770777 val_bpb:1.11211122
"""

UNSCORED = """\
model_params:28000000
seed:1337
step:2950/20000 val_loss:2.0011 val_bpb:1.1811 train_time:600100ms step_avg:203.42ms
swa:applying averaged 30 checkpoints
Serialized model: 111000000 bytes
Code size: 80000 bytes
Total submission size: 111080000 bytes
Serialized model rdquant+zstd: 16500000 bytes
Total submission size: 16580000 bytes
"""
