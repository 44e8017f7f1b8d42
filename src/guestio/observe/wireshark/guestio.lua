-- Dissector for events of guestio in pcapng files, as `guestio convert` and `guestio extcap` write.
--
--   tshark -X lua_script:guestio.lua -r events.pcapng -Y 'guestio.what == "completed"'
--
-- Each packet holds "gio", a version, the length of a request's content, a record of 64 bytes (the
-- fields of guestio.trace.RECORD, little-endian), and that content.

-- Installed, and named on the command line as well.
local known, dissector = pcall(Dissector.get, "guestio")
if known and dissector then return end

local WHAT = {
  [1] = "available", [2] = "taken", [3] = "stalled", [4] = "served", [5] = "completed",
  [6] = "interrupt", [7] = "failed", [8] = "buffer",
  [9] = "lacking", [10] = "content", [11] = "data",
  [16] = "miss", [17] = "update", [18] = "invalidate", [19] = "refused", [20] = "evicted",
  [21] = "dma_map", [22] = "dma_unmap", [23] = "domain_map", [24] = "domain_unmap",
  [25] = "attached", [26] = "fault",
  [32] = "region_added", [33] = "region_removed", [34] = "harvest", [35] = "message",
  [36] = "connected", [37] = "disconnected", [38] = "queue_started", [39] = "queue_stopped",
  [40] = "queue_broken", [41] = "reset", [42] = "error",
}
local ACCESS = { [0] = "none", [1] = "read", [2] = "write", [3] = "read and write" }
local BLK_TYPE = {
  [0] = "read", [1] = "write", [4] = "flush", [8] = "get id", [11] = "discard",
  [13] = "write zeroes",
}
local BLK_STATUS = { [0] = "ok", [1] = "I/O error", [2] = "unsupported" }
-- Kinds that say that something went wrong.
local BAD = { [7] = true, [19] = true, [26] = true, [40] = true, [42] = true }
local NO_QUEUE, NO_HEAD = 0xffff, 0xffffffff
local HEAD, RECORD = 8, 64

local proto = Proto("guestio", "guestio event")
local f = {
  version = ProtoField.uint8("guestio.version", "Version"),
  content = ProtoField.uint32("guestio.content.length", "Content length"),
  time = ProtoField.uint64("guestio.time", "Time (ns, CLOCK_MONOTONIC)"),
  since = ProtoField.uint64("guestio.since", "Began (ns)"),
  address = ProtoField.uint64("guestio.address", "Address", base.HEX),
  length = ProtoField.uint64("guestio.length", "Length"),
  detail = ProtoField.uint64("guestio.detail", "Detail", base.HEX),
  result = ProtoField.int64("guestio.result", "Result"),
  thread = ProtoField.uint32("guestio.thread", "Thread"),
  head = ProtoField.uint32("guestio.head", "Head"),
  number = ProtoField.uint16("guestio.number", "Number of the event"),
  what = ProtoField.string("guestio.what", "Event"),
  origin = ProtoField.uint16("guestio.origin", "Server"),
  queue = ProtoField.uint16("guestio.queue", "Queue"),
  access = ProtoField.uint16("guestio.access", "Access", base.DEC, ACCESS),
  took = ProtoField.uint64("guestio.took", "Took (ns)"),
  taken_in = ProtoField.framenum("guestio.taken_in", "Taken in", base.NONE, frametype.REQUEST),
  data = ProtoField.bytes("guestio.content", "Content"),
  blk_type = ProtoField.uint32("guestio.blk.type", "Block request", base.DEC, BLK_TYPE),
  blk_sector = ProtoField.uint64("guestio.blk.sector", "Sector"),
  blk_status = ProtoField.uint8("guestio.blk.status", "Block status", base.DEC, BLK_STATUS),
}
proto.fields = f
local failure = ProtoExpert.new("guestio.failure", "Something went wrong", expert.group.RESPONSE_CODE,
  expert.severity.WARN)
proto.experts = { failure }
proto.prefs.block = Pref.bool("Contents are of a virtio-blk disk", true,
  "Shows the headers of block requests")

-- In the order of the record.
local LAYOUT = {
  { "time", 8 }, { "since", 8 }, { "address", 8 }, { "length", 8 }, { "detail", 8 },
  { "result", 8 }, { "thread", 4 }, { "head", 4 }, { "what", 2 }, { "origin", 2 },
  { "queue", 2 }, { "access", 2 },
}

-- The packet in which a request was taken that is in flight, and those of finished ones.
local in_flight, taken_in = {}, {}
function proto.init()
  in_flight, taken_in = {}, {}
end

local function key(origin, queue, head)
  return origin .. "/" .. queue .. "/" .. head
end

local function describe(at, queue, head, name)
  local parts = { name }
  if queue ~= NO_QUEUE then parts[#parts + 1] = "queue " .. queue end
  if head ~= NO_HEAD then parts[#parts + 1] = "head " .. head end
  if at.address():le_uint64() ~= UInt64(0) then
    parts[#parts + 1] = "0x" .. at.address():le_uint64():tohex():gsub("^0+", "")
  end
  if at.length():le_uint64() ~= UInt64(0) then
    parts[#parts + 1] = "+" .. tostring(at.length():le_uint64())
  end
  return table.concat(parts, " ")
end

local function dissect_content(content, number, tree)
  local shown = tree:add_le(f.data, content)
  if not proto.prefs.block then return end
  if number == 2 and content:len() >= 16 then
    shown:add_le(f.blk_type, content(0, 4))
    shown:add_le(f.blk_sector, content(8, 8))
  elseif number == 5 and content:len() >= 1 then
    shown:add_le(f.blk_status, content(content:len() - 1, 1))
  end
end

function proto.dissector(buffer, info, root)
  if buffer:len() < HEAD + RECORD or buffer(0, 3):string() ~= "gio" then return 0 end
  info.cols.protocol = "guestio"
  local tree = root:add(proto, buffer())
  tree:add(f.version, buffer(3, 1))
  if buffer(3, 1):uint() ~= 1 then return buffer:len() end
  tree:add_le(f.content, buffer(4, 4))
  local at, offset = {}, HEAD
  for _, field in ipairs(LAYOUT) do
    local range = buffer(offset, field[2])
    at[field[1]] = function() return range end
    offset = offset + field[2]
  end
  local number = at.what():le_uint()
  local name = WHAT[number] or ("event " .. number)
  local queue, head = at.queue():le_uint(), at.head():le_uint()
  local origin = at.origin():le_uint()
  tree:add(f.what, at.what(), name)
  tree:add_le(f.number, at.what())
  for _, field in ipairs({ "time", "address", "length", "detail", "result", "thread", "origin",
    "access" }) do
    tree:add_le(f[field], at[field]())
  end
  if queue ~= NO_QUEUE then tree:add_le(f.queue, at.queue()) end
  if head ~= NO_HEAD then tree:add_le(f.head, at.head()) end
  if at.since():le_uint64() ~= UInt64(0) then
    tree:add_le(f.since, at.since())
    tree:add(f.took, at.time()(0, 8), at.time():le_uint64() - at.since():le_uint64())
      :set_generated()
  end
  if BAD[number] then tree:add_proto_expert_info(failure, name) end
  if head ~= NO_HEAD then
    local this = key(origin, queue, head)
    if not info.visited then
      if number == 2 then
        in_flight[this] = info.number
      elseif in_flight[this] then
        taken_in[info.number] = in_flight[this]
        if number == 5 then in_flight[this] = nil end
      end
    end
    if taken_in[info.number] then
      tree:add(f.taken_in, at.head(), taken_in[info.number]):set_generated()
    end
  end
  info.cols.info = describe(at, queue, head, name)
  local length = math.min(buffer(4, 4):le_uint(), buffer:len() - HEAD - RECORD)
  if length > 0 then dissect_content(buffer(HEAD + RECORD, length), number, tree) end
  return buffer:len()
end

local encapsulations = wtap_encaps or wtap
DissectorTable.get("wtap_encap"):add(encapsulations.USER0, proto)
