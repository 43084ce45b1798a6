// Conversations, kept in the browser's IndexedDB. A conversation and each of its messages are records of their own, so
// that a long answer is written again and again without the images before it.

let opening;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mlx_qwen35", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" }); // {id, title, updated}
      request.result.createObjectStore("messages"); // by [conversation, index]
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

// Do something in one transaction over both stores. Gives the result of the request that `work` returns.
async function transact(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(["conversations", "messages"], mode);
    const request = work(transaction.objectStore("conversations"), transaction.objectStore("messages"));
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

// Read or write. What fails (no room, no permission) is told and gives nothing, and the conversation goes on.
const read = (work) => transact("readonly", work).catch(tell);
const write = (work) => transact("readwrite", work).catch(tell);

function tell(error) {
  dispatchEvent(new CustomEvent("unkept", { detail: error.message }));
}

// The keys of a conversation's messages, from one index on.
function messageKeys(id, from = 0) {
  return IDBKeyRange.bound([id, from], [id, Infinity]);
}

// All conversations, the newest first.
export async function listConversations() {
  const all = (await read((conversations) => conversations.getAll())) ?? [];
  return all.sort((one, other) => other.updated - one.updated);
}

export function loadConversation(id) {
  return read((conversations) => conversations.get(id));
}

export async function loadMessages(id) {
  return (await read((_, messages) => messages.getAll(messageKeys(id)))) ?? [];
}

export function saveConversation({ id, title, updated }) {
  return write((conversations) => void conversations.put({ id, title, updated }));
}

// Nothing is written once the conversation was deleted.
export function saveMessage(id, index, message) {
  return write((conversations, messages) => {
    conversations.get(id).onsuccess = ({ target }) => target.result && messages.put(message, [id, index]);
  });
}

// Delete the messages from one index on.
export function dropMessages(id, from) {
  return write((_, messages) => void messages.delete(messageKeys(id, from)));
}

export function deleteConversation(id) {
  return write((conversations, messages) => {
    conversations.delete(id);
    messages.delete(messageKeys(id));
  });
}
