"""Documents that small models and tokenizers of tests are made from."""

SIGNS = ["fever", "a cough", "a sore throat", "back pain", "头痛", "咳嗽", "发烧", "牙痛", "失眠", "a rash"]
ADVICE = [
    "Rest at home and drink water.",
    "See a doctor when it lasts.",
    "多喝水，注意休息。",
    "三天不退要去医院。",
]
DOCUMENTS = [f"Someone has {sign}. {advice}" for sign in SIGNS for advice in ADVICE] + [
    f"问：{sign}怎么办？答：{advice}\n\n{advice}" for sign in SIGNS for advice in ADVICE[2:]
]  # the blank lines make two line ends one token, as in most tokenizers
