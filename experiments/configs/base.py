"""Every field that a training config has, with a default that works.

Not an experiment: the files beside this one are. Any field can be set on the command line, as
`--config.local.learning_rate=0.05`; unknown fields and wrong types are refused.
"""

from __future__ import annotations

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict, FieldReference


def get_config() -> ConfigDict:
    """The default of every field."""
    config = ConfigDict()
    config.seed = 0
    config.rounds = 40

    config.data = ConfigDict()
    # "digits" (embedded), "text" (of data.dir: a folder of *.txt, one a domain), "python_topics"
    # (text of the Python installation), any TFDS image-classification data set, or a file.npz of
    # your own
    config.data.name = "digits"
    # Of prepared TFDS data, empty for TFDS's own default; a relative file.npz begins there, too.
    config.data.dir = ""
    config.data.download = False
    config.data.train_limit = 0  # examples, drawn evenly over classes; 0 for all
    config.data.test_limit = 0
    # Side in pixels of uint8 images; 0 for the data set's own, or 32 if it varies.
    config.data.image_size = 0

    config.data.length = 64  # tokens of an example of text

    config.task = ConfigDict()
    config.task.name = "classification"  # classification | next_token

    config.partition = ConfigDict()
    config.partition.name = "dirichlet"  # iid | k_class | dirichlet | shards | natural | domains
    config.partition.classes_per_client = 4  # of k_class
    config.partition.alpha = 0.3  # of dirichlet: small is skewed
    config.partition.shards_per_client = 2  # of shards
    config.partition.quantity_skew = 0.0  # spread of client sizes on top of any partition
    config.partition.min_per_client = 10  # examples
    config.partition.domains_per_client = 2  # of domains: texts that each client has a run of
    # Of domains: of all its texts together; 0 to divide every text among its clients.
    config.partition.bytes_per_client = 0

    config.clients = ConfigDict()
    config.clients.count = 20  # C
    # Of these, kept out of training: drawn, then probed, given experts and tested at evaluations.
    config.clients.newcomers = 0
    config.clients.per_round = 0  # P; 0 for all that train
    config.clients.sampling = "uniform"  # uniform | examples: in proportion to what clients have
    # k_c: a number (2), a range ("1-4") or a list ([1, 2, 4]), dealt out evenly, at random; or
    # "memory": as many as each client's device has room for (needs edge.mix).
    config.clients.capacity = FieldReference("1-4", field_type=object)

    config.model = ConfigDict()
    config.model.backbone = "convnet"  # mlp | cnn | convnet | resnet | transformer
    config.model.widths = config_dict.placeholder(tuple)  # of its layers; unset for its own default
    config.model.depth = 0  # of resnet (6n+2), blocks of transformer; 0 for its own default
    config.model.heads = 4  # of transformer's attention
    config.model.positions = "rotary"  # of transformer's tokens: rotary | learnt
    config.model.moe_every = 1  # of transformer: experts in every n-th block, the last one first
    # Of resnet: stages with experts after them, as "1,2,3"; empty for experts after any backbone.
    config.model.moe_stages = ""
    config.model.groups = 0  # of the group normalisation; 0 for the backbone's default
    config.model.conv = "auto"  # auto | matmul | direct | winograd | lax
    config.model.experts = 8  # E
    config.model.hidden = 128  # H
    config.model.top_k = 1  # experts per example
    config.model.shared_experts = 0  # beside those E: held by everybody, used on every example
    config.model.gate = "shared"  # shared: a gate's row travels with its expert | private
    # Parts of the model that stay with their clients, as "head,backbone/local"; empty for none.
    config.model.private = ""
    config.model.local_backbone = False  # mixes in a second backbone, of the client's own (pFedMoE)

    config.local = ConfigDict()
    config.local.epochs = 1
    config.local.batch_size = 32  # B
    config.local.max_steps = 0  # cap on the local steps of a round; 0 for none
    config.local.optimizer = "sgd"  # sgd | adam
    config.local.learning_rate = 0.1
    config.local.expert_rate = 1.0  # factor on it for experts and gate, whose gradients are small
    config.local.decay = "none"  # of the learning rate, from round to round: none | linear | cosine
    config.local.augment = "none"  # of training images: none | flip | crop | crop_flip
    config.local.momentum = 0.0  # of sgd
    config.local.clip_norm = 0.0  # cap on the gradient's global norm; 0 for none
    config.local.proximal = 0.0  # μ of FedProx
    # Weight of the Switch-style balance loss over the held experts: keeps them all in use.
    config.local.balance = 0.1
    config.local.z = 0.0  # weight of the router z-loss
    # τ: the loss is taken of logits + τ log of the client's label shares, which then carry none.
    config.local.prior = 0.0

    config.server = ConfigDict()
    config.server.optimizer = "sgd"  # sgd | adam: applied to the mean update
    config.server.learning_rate = 1.0
    config.server.momentum = 0.0  # of sgd
    # mean | median | trimmed_mean (by coordinate) | geometric_median
    config.server.aggregator = "mean"
    config.server.trim = 0.1  # of trimmed_mean: part of the updates left out at either end
    config.server.quarantine = True  # refuse updates that are not numbers
    # and those this many times as long as the median of lately, for their steps; 0 for no limit.
    config.server.norm_factor = 10.0
    config.server.norm_limit = 0.0  # and those of a greater L2 norm; 0 for no limit
    config.server.clip = 0.0  # L2 norm to which updates are cut; 0 for none
    config.server.noise_multiplier = 0.0  # of differential privacy; 0 for none
    # Where that noise comes from: secret (the system's entropy, kept nowhere), or simulated (the
    # run's seed: the same every time, and private from nobody who knows the config).
    config.server.noise = "secret"
    config.server.delta = 1e-5  # δ of the guarantee that is reported

    config.upload = ConfigDict()
    config.upload.compression = "none"  # none | bfloat16 | int8 | top_k
    config.upload.kept = 0.1  # of top_k: part of the entries sent
    config.upload.error_feedback = True  # what compression loses is added to the next update

    config.edge = ConfigDict()
    # The clients' devices: tiers and their weights, as "sensor:2,phone:1,gateway:1". Empty for
    # none, and then no simulated time.
    config.edge.mix = ""
    config.edge.tiers = ""  # a TOML file of tiers; empty for flexmoe_jax/edge/tiers.toml
    config.edge.availability = "always"  # always | independent | markov | a file of 0 and 1
    config.edge.mean_on_rounds = 5.0  # of markov: how long a client stays
    config.edge.over_select = 1.0  # clients asked, over clients wanted
    config.edge.deadline = 0.0  # simulated seconds after which a round ends; 0 for none
    config.edge.late = "drop"  # drop | partial: what becomes of clients at work then
    config.edge.dropout_before = 0.0  # probability of being gone before the download
    config.edge.dropout_during = 0.0  # probability that the work never arrives
    config.edge.cache = True  # an expert that a client still has is not sent again

    config.faults = ConfigDict()
    config.faults.share = 0.0  # of the clients, whose every update is wrong
    # nan | flip (turned around) | scale (1000 times too long) | noise (added, 10 times as long)
    config.faults.kind = "nan"

    config.assignment = ConfigDict()
    config.assignment.policy = "flex"  # or greedy, greedy_usage, random, round_robin, static, full
    # same: an expert is a column through all MoE layers | each: every layer is assigned by itself
    config.assignment.layers = "same"
    config.assignment.solver = "auto"
    # What load is: clients (holders), samples or usage (that holders train on, or are foreseen to
    # send the expert); or auto: clients where capacities are equal, usage where they differ.
    config.assignment.load = "auto"
    config.assignment.slack = 0.1  # δ: by how much of the mean load an expert's load may miss it
    config.assignment.deficit_decay = 1.0  # 1 never forgets what an expert was owed, 0 always does
    config.assignment.rounding = "repair"  # repair | shmoys_tardos, where loads are weighted
    config.assignment.backend = "HIGHS"  # CVXPY solver of relaxations, of those installed
    config.assignment.holders_min = 0  # least holders of every expert
    config.assignment.balance = 0.0  # price of the squared distance of loads from their target
    config.assignment.diversity = 0.0  # price of holders whose label mix differs from all clients'
    config.assignment.movement = 0.0  # price of sending an expert to a client that has it not
    # Width of the noise on the fitness, drawn anew every round. Holders that stay would teach an
    # expert their few classes alone. 0, with local.balance 0 and private gates: as in the paper.
    config.assignment.exploration = 1.0
    config.assignment.exploration_rounds = 0  # in which it falls to 0; 0 for never
    config.assignment.time_limit = 60.0  # seconds of a solver; then even loads; 0 for none

    config.fitness = ConfigDict()
    config.fitness.score = "accuracy"  # accuracy | loss
    config.fitness.alpha = 1.0  # α of the loss score exp(-α l)
    config.fitness.beta = 0.5  # β: weight of the newest score
    config.fitness.initial = 1.0  # start value of Q: at 1 no pair beats an untried one
    config.fitness.optimism = 0.0  # bonus for pairs never tried

    config.execution = ConfigDict()
    config.execution.devices = 0  # that share a round; 0 for all (on CPU: one a core)
    config.execution.client_block_size = 0  # clients side by side on a device; 0 for automatic
    # Where training examples stay: device; host, from where a cohort's are sent while the round
    # before it computes; or auto: device, unless they took more than half of its memory.
    config.execution.data = "auto"
    config.execution.tile = 0  # examples whose gradient is taken at once; 0 for automatic

    config.eval = ConfigDict()
    config.eval.every = 1  # rounds; the last round is always evaluated
    config.eval.batch_size = 500
    # A client adds the log of its label shares to its logits: for personal figures, and no others.
    config.eval.prior = True

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 10  # rounds; the last round is always saved
    config.checkpoint.keep = 2

    config.tensorboard = False  # event files in WORKDIR/tensorboard (extra: tensorboard)
    return config
